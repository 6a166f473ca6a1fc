"""A worker's end of the pipe to its supervisor."""

from __future__ import annotations

import contextlib
import threading
from multiprocessing.connection import Connection

from caltech_hpo.search.messages import EpochDone, Job, Measure, Pause, Underway

LOOK_EVERY = 0.5  # seconds
GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # there is no supervisor any more


class Line:
    """What comes from the supervisor: jobs and decisions, and in between a Pause."""

    def __init__(self, connection: Connection) -> None:
        """`terminated` may be set by a signal handler."""
        self._connection = connection
        self._paused = False
        self.terminated = threading.Event()

    def next_job(self) -> Job | Measure | None:
        """The next job; None when there is none any more."""
        self._paused = False
        while not self.terminated.is_set():
            if not self._connection.poll(LOOK_EVERY):  # a signal alone would not end the waiting
                continue
            message: Job | Measure | Pause | None = self._connection.recv()
            if not isinstance(message, Pause):  # the job it was for has ended
                return message
        return None

    def decision(self, epoch: EpochDone) -> bool:
        """Tells of an epoch; returns whether the job goes on.

        It does if the supervisor is gone, or SIGTERM comes before its answer: then it is `interrupted` at
        once, and saved. Ending here would lose the epochs since the last checkpoint.
        """
        try:
            self._connection.send(epoch)
            message = self._answer()
            if isinstance(message, Pause):  # it crossed the epoch on its way
                self._paused = True
                message = self._answer()
        except GONE:
            return True
        return bool(message)

    def _answer(self) -> bool | Pause:
        while not self._connection.poll(LOOK_EVERY):
            if self.terminated.is_set():
                return True
        answer: bool | Pause = self._connection.recv()
        return answer

    def tell(self, event: Underway) -> None:
        """Says where a training is. That the supervisor is gone, `interrupted` finds out."""
        with contextlib.suppress(*GONE):
            self._connection.send(event)

    def interrupted(self) -> bool:
        """Whether a job shall pause. In mid-epoch nothing else comes, so whatever has come says so."""
        return self._paused or self.terminated.is_set() or self._connection.poll()
