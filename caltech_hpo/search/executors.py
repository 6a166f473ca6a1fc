"""Where workers run: in this process, or in local processes. One small interface for both."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, overload

from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.search.messages import (
    Died,
    EpochDone,
    Event,
    Job,
    Measure,
    Pause,
    Ready,
    Refused,
    WorkerConfig,
    Working,
)

# glibc returns every freed activation (tens of MB each) to the system and faults it in again at the
# next step. Keeping freed memory, in huge pages, made an AlexNet step on a CPU 1.25 times as fast.
GLIBC_TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
)


ATTEMPTS = 3  # at starting a worker
CLOSING = 15.0  # seconds that a worker has to save where its job is
Target = Callable[[Connection, Any], None]


def _run_worker(connection: Connection, config: WorkerConfig) -> None:
    """`worker_main`, imported where it runs: the supervisor needs no torch.

    Importing torch and torchvision makes 330,000 objects that stay. Looking for garbage among them took a
    fifth of a worker's start, taking them all apart at its end another fifth (n = 4): nothing is collected
    until the worker is ready, and it ends at once. What it writes is on the disk when it says so.
    """
    gc.disable()
    from caltech_hpo.search.worker import worker_main

    worker_main(connection, config)
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Executor(Protocol):
    """Runs jobs on workers. One caller, one thread; every EpochDone must be answered."""

    ready: Ready

    @property
    def free(self) -> int:
        """How many workers have no job. One that died counts once its successor is ready."""

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
    job: int | None = None
    ready: bool = False


class ProcessExecutor:
    """Local worker processes (spawn: forking after torch's threads have run hangs the child)."""

    def __init__(self, config: WorkerConfig | None, workers: int, target: Target | None = None) -> None:
        """Starts the workers and waits until all are ready. Raises what a worker refuses with.

        `target` takes the place of `worker_main`, to measure what is not training.
        """
        self._config, self._target = config, target or _run_worker
        self._workers: list[_Worker] = []
        self._ready: list[Any] = []  # connections that have something to say, each to be read once
        try:
            self._workers = [self._spawn() for _ in range(workers)]
            self.ready, *_ = [self._started(index) for index in range(workers)]
        except BaseException:
            self.close()
            raise

    def _spawn(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=self._target, args=(theirs, self._config), daemon=True)
        with worker_environment():
            process.start()
        theirs.close()  # so that the pipe closes when the worker dies
        return _Worker(process, ours)

    def _started(self, index: int) -> Ready:
        """Waits until a worker is ready; one that is killed meanwhile gets two more attempts."""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._workers[index].connection.close()
                self._workers[index] = self._spawn()
            with contextlib.suppress(ChildProcessError):
                return self._await_ready(self._workers[index])
        raise CaltechHpoError(
            f"a worker was killed {ATTEMPTS} times before it was ready",
            "mostly that is for lack of memory: use fewer --workers, then run again",
        )

    def _await_ready(self, worker: _Worker) -> Ready:
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            code = worker.process.exitcode or 0
            # Killed is somebody's doing, for lack of memory say; any other end is a bug.
            error = ChildProcessError if code < 0 else RuntimeError
            raise error(f"a worker ended with exit code {code} before it was ready") from None
        if isinstance(message, Refused):
            raise message.error
        assert isinstance(message, Ready)
        worker.ready = True
        return message

    @property
    def free(self) -> int:
        """Workers without a job."""
        return sum(worker.job is None for worker in self._workers)

    def submit(self, job: Job | Measure) -> None:
        """Sends the job to the first free worker."""
        worker = next(worker for worker in self._workers if worker.job is None)
        worker.job = job.number
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # next_event will say Died
            worker.connection.send(job)

    def event_within(self, seconds: float) -> bool:
        """Whether a worker with a job speaks, or dies, within so many seconds."""
        if not self._ready:
            self._ready = wait(
                [worker.connection for worker in self._workers if worker.job is not None], seconds
            )
        return bool(self._ready)

    @overload
    def next_event(self) -> Event: ...

    @overload
    def next_event(self, seconds: float) -> Event | None: ...

    def next_event(self, seconds: float | None = None) -> Event | None:
        """The next event; a dead worker is replaced before its Died is returned."""
        busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
        ready = self._ready or wait(list(busy), seconds)
        if not ready:
            return None
        worker = busy[ready[0]]  # type: ignore[index]
        self._ready = ready[1:]
        assert worker.job is not None
        try:
            event: Event = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            died = Died(worker.job, worker.process.exitcode or 0)
            worker.connection.close()
            index = self._workers.index(worker)
            self._workers[index] = self._spawn()
            self._started(index)
            return died
        if not isinstance(event, (EpochDone, Working)):
            worker.job = None
        return event

    def answer(self, job: int, go_on: bool) -> None:
        """Sends the decision to the job's worker."""
        worker = next(worker for worker in self._workers if worker.job == job)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # next_event will say Died
            worker.connection.send(go_on)

    def pause(self) -> None:
        """Sends Pause to all that have a job."""
        for worker in self._workers:
            if worker.job is not None:
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
                if worker.ready and worker.job is None and worker.process.is_alive():
                    worker.connection.send(None)
                else:
                    worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=CLOSING)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self._workers = []


@contextlib.contextmanager
def worker_environment(*, tuned: bool = True) -> Iterator[None]:
    """What a child inherits: Ctrl-C ignored from its first instant, and if `tuned` the allocator settings."""
    ours = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no change
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if ours else None
    before = os.environ.get("GLIBC_TUNABLES")
    if tuned and sys.platform == "linux" and before is None:
        os.environ["GLIBC_TUNABLES"] = GLIBC_TUNABLES
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)
        if before is None:
            os.environ.pop("GLIBC_TUNABLES", None)
