"""Where workers run: in this process, or in local processes. One small interface for both."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, overload

from caltech_hpo.data.cache import Progress
from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.search.messages import (
    STARTING,
    Died,
    EpochDone,
    Event,
    Job,
    Measure,
    Midway,
    Pause,
    Ready,
    Refused,
    WorkerConfig,
)
from caltech_hpo.search.spawning import Early, Target, run_worker, spawn

ATTEMPTS = 3  # at starting a worker
TOO_MANY_LOSSES = (
    f"a worker was killed {ATTEMPTS} times before it was ready",
    "mostly that is for lack of memory: use fewer --workers, then run again",
)
CLOSING = 45.0  # seconds that a worker has to save where its job is


class Executor(Protocol):
    """Runs jobs on workers. One caller, one thread; every EpochDone must be answered."""

    ready: Ready

    @property
    def free(self) -> int:
        """How many workers have no job."""

    def submit(self, job: Job | Measure) -> None:
        """Gives a job to a free worker."""

    def event_within(self, seconds: float) -> bool:
        """Whether the next event comes within so many seconds; waits no longer."""

    @overload
    def next_event(self) -> Event: ...

    @overload
    def next_event(self, seconds: float) -> Event | None: ...

    def next_event(self, seconds: float | None = None) -> Event | None:
        """Waits for the next event of any worker with a job; None if none came in so many seconds."""

    def answer(self, job: int, go_on: bool) -> None:
        """Tells the worker that waits after an epoch to go on or to stop."""

    def pause(self) -> None:
        """Asks all jobs to save where they are and to be Paused."""

    def kill(self, job: int) -> None:
        """Ends the job's worker at once; `next_event` will say Died."""

    def close(self) -> None:
        """Ends the workers; jobs still running stop where their last checkpoint is."""


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: Job | Measure | None = None
    ready: bool = False
    losses: int = 0  # in a row, of processes in this place, before they were ready

    @property
    def job(self) -> int | None:
        return None if self.task is None else self.task.number


def _require_killed(code: int) -> None:
    """Killed is somebody's doing, for lack of memory say; any other end before it was ready is a bug."""
    if code >= 0:
        raise RuntimeError(f"a worker ended with exit code {code} before it was ready")


class ProcessExecutor:
    """Local worker processes (spawn: forking after torch's threads have run hangs the child)."""

    def __init__(
        self, config: WorkerConfig | None, workers: int, target: Target | None = None,
        progress: Progress | None = None, early: Early | None = None,
    ) -> None:  # fmt: skip
        """Starts the workers and waits until all are ready. Raises what a worker refuses with.

        `target` takes the place of `worker_main`, to measure what is not training. Takes over, out of the
        list, those that were `started_early`.
        """
        self._config, self._target = config, target or run_worker
        self._workers: list[_Worker] = []
        self._ready: list[Any] = []  # connections that have something to say, each to be read once
        try:
            while early and len(self._workers) < workers:
                self._workers.append(_Worker(*early.pop()))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `_started` sees its end
                    self._workers[-1].connection.send(config)
            self._workers += [self._spawn() for _ in range(workers - len(self._workers))]
            self.ready, *_ = [self._started(index, progress) for index in range(workers)]
            if progress:
                progress(STARTING, workers, workers)
        except BaseException:
            self.close()
            raise

    def _spawn(self) -> _Worker:
        return _Worker(*spawn(self._target, self._config))

    def _started(self, index: int, progress: Progress | None) -> Ready:
        """Waits until a worker is ready; one that is killed meanwhile gets two more attempts."""
        if progress:
            progress(STARTING, index, len(self._workers))
        for attempt in range(ATTEMPTS):
            if attempt:
                self._workers[index].connection.close()
                self._workers[index] = self._spawn()
            with contextlib.suppress(ChildProcessError):
                return self._await_ready(self._workers[index])
        raise CaltechHpoError(*TOO_MANY_LOSSES)

    def _await_ready(self, worker: _Worker) -> Ready:
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            code = worker.process.exitcode or 0
            _require_killed(code)
            raise ChildProcessError(f"a worker was killed by signal {-code} before it was ready") from None
        if isinstance(message, Refused):
            raise message.error
        assert isinstance(message, Ready)
        worker.ready = True
        return message

    @property
    def free(self) -> int:
        """Workers without a job; one that still starts takes it when it is ready."""
        return sum(worker.task is None for worker in self._workers)

    def submit(self, job: Job | Measure) -> None:
        """Sends the job to the first free worker."""
        worker = next(worker for worker in self._workers if worker.task is None)
        worker.task = job
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # next_event will say Died
            worker.connection.send(job)

    def event_within(self, seconds: float) -> bool:
        """Whether a worker with a job speaks, or dies, within so many seconds."""
        if not self._ready:
            self._ready = wait(
                [worker.connection for worker in self._workers if worker.task is not None], seconds
            )
        return bool(self._ready)

    @overload
    def next_event(self) -> Event: ...

    @overload
    def next_event(self, seconds: float) -> Event | None: ...

    def next_event(self, seconds: float | None = None) -> Event | None:
        """The next event. A dead worker's successor starts while the others go on."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
            left = None if until is None else max(0.0, until - time.monotonic())
            ready = self._ready or wait(list(busy), left)
            if not ready:
                return None
            self._ready = ready[1:]
            event = self._read(busy[ready[0]])  # type: ignore[index]
            if event is not None:
                return event

    def _read(self, worker: _Worker) -> Event | None:
        """What the worker says; None where that is only that it is ready, or ended before it was."""
        assert worker.task is not None
        try:
            event: Event | Ready | Refused = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            return self._replace(worker)
        if isinstance(event, Refused):
            raise event.error
        if isinstance(event, Ready):
            worker.ready, worker.losses = True, 0
            return None
        if not isinstance(event, EpochDone | Midway):
            worker.task = None
        return event

    def _replace(self, worker: _Worker) -> Died | None:
        """Starts a dead worker's successor; one that ended before it was ready leaves it its job."""
        worker.process.join()
        code, task, losses = worker.process.exitcode or 0, worker.task, worker.losses + 1
        assert task is not None
        if not worker.ready:
            _require_killed(code)
            if losses == ATTEMPTS:
                raise CaltechHpoError(*TOO_MANY_LOSSES)
        worker.connection.close()
        successor = self._spawn()
        self._workers[self._workers.index(worker)] = successor
        if worker.ready:
            return Died(task.number, code)
        successor.task, successor.losses = task, losses
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            successor.connection.send(task)
        return None

    def answer(self, job: int, go_on: bool) -> None:
        """Sends the decision to the job's worker."""
        worker = next(worker for worker in self._workers if worker.job == job)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # next_event will say Died
            worker.connection.send(go_on)

    def pause(self) -> None:
        """Sends Pause to all that have a job."""
        for worker in self._workers:
            if worker.task is not None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    worker.connection.send(Pause())

    def kill(self, job: int) -> None:
        """Ends the job's worker at once; `next_event` will say Died."""
        for worker in self._workers:
            if worker.job == job:
                worker.process.kill()

    def close(self) -> None:
        """Asks idle workers to leave, ends busy ones, waits for all."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                if worker.ready and worker.task is None and worker.process.is_alive():
                    worker.connection.send(None)
                elif isinstance(worker.task, Measure):  # it has nothing to save, and looks up after a while
                    worker.process.kill()
                else:
                    worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=CLOSING)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self._workers = []
