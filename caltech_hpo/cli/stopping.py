"""Ctrl-C and SIGTERM during a search: the first one pauses it, the second one ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PARENT = "CALTECH_HPO_ENDS_WITH"  # serve's process id, in the environment of its searches
SIGNAL_EXIT = 128  # plus the signal's number: what a shell reports
PAUSING = "pausing: the batch is finished and a checkpoint saved; once more stops at once"


class StopSignals:
    """Counts the signals that ask a search to stop, while they are `caught`."""

    def __init__(self, message: str = PAUSING) -> None:
        """`message` is what the first one is answered."""
        self._message = f"\n{message}\n".encode()
        parent = os.environ.get(PARENT, "")
        self._parent = int(parent) if parent.isdigit() else None
        self._count = 0
        self.exit_code = 0

    def asked(self) -> bool:
        """Whether a signal has come, or the process is gone with which this one is to end."""
        if self._parent is not None and os.getppid() != self._parent and not self._count:
            self._count, self.exit_code = 1, SIGNAL_EXIT + signal.SIGTERM
        return self._count > 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """The second signal raises KeyboardInterrupt here."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._take) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        self._count += 1
        self.exit_code = SIGNAL_EXIT + number
        if self._count > 1:
            raise KeyboardInterrupt
        os.write(2, self._message)  # a signal handler must not touch buffered streams
