"""One worker in this process: for tests and debugging."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from caltech_hpo.search.messages import (
    EpochDone,
    Event,
    Job,
    Measure,
    Midway,
    Ready,
    WorkerConfig,
)

if TYPE_CHECKING:
    from caltech_hpo.search.worker import JobEvent, WorkerContext


class InlineExecutor:
    """One worker in this process, for tests and debugging: it trains while `next_event` waits."""

    def __init__(self, config: WorkerConfig) -> None:
        """Opens the data. Raises CaltechHpoError as `open_worker` does."""
        from caltech_hpo.search.worker import open_worker

        self._context: WorkerContext = open_worker(config)
        self.ready: Ready = self._context.ready
        self._events: Generator[JobEvent, bool, None] | None = None
        self._go_on: bool | None = None
        self._paused = False

    @property
    def free(self) -> int:
        """1 between jobs, else 0."""
        return int(self._events is None)

    def submit(self, job: Job | Measure) -> None:
        """Prepares the job; it runs in `next_event`."""
        from caltech_hpo.search.worker import run_job

        self._paused = False
        self._events, self._go_on = run_job(job, self._context, lambda: self._paused), None

    def event_within(self, seconds: float) -> bool:
        """False: nothing happens before `next_event`."""
        return False

    def next_event(self, seconds: float | None = None) -> Event:
        """Trains until the job's next event, however long it takes."""
        assert self._events is not None, "no job"
        event = next(self._events) if self._go_on is None else self._events.send(self._go_on)
        self._go_on = None
        if not isinstance(event, EpochDone | Midway):
            self._events = None
        return event

    def answer(self, job: int, go_on: bool) -> None:
        """Remembered until `next_event`."""
        self._go_on = go_on

    def pause(self) -> None:
        """Remembered until `next_event`."""
        self._paused = True

    def kill(self, job: int) -> None:
        """Drops the job: there is no process to end."""
        self._events = None

    def close(self) -> None:
        """Drops the job."""
        self._events = None
