"""How many workers one supervisor can hold: simulated ones that report an epoch once a second each."""

from __future__ import annotations

import heapq
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from caltech_hpo.search.messages import EpochDone, Event, Finished, Job, Measure, Ready
from caltech_hpo.search.overhead import made_up, overhead_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from caltech_hpo.spec import EpochResult

EPOCHS = 100  # of a trial: with 1,000 workers ten trials begin and end each second
INTERVAL = 1.0  # seconds between a worker's reports


@dataclass(frozen=True)
class ReportsHeld:
    """What a supervisor held over `seconds`: `held` of `offered` reports a second, of `workers` workers.

    `late` is how long the last reports waited, in seconds. The shares are of the supervisor's time, 0 to 1:
    drawing parameters (`sampling`), writing the database (`writing`), waiting for reports (`idle`); the rest
    is pruning and bookkeeping.
    """

    database: str
    sampler: str
    workers: int
    seconds: float
    offered: float
    held: float
    late: float
    trials: int
    sampling: float
    writing: float
    idle: float


class SimulatedWorkers:
    """An executor of workers that do nothing: each has its next epoch ready one second after the last.

    The first trial of each is cut short, so that from the start as many trials end in every second.
    """

    ready = Ready(device="none", precision="fp32", versions={})

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._jobs: dict[int, Iterator[EpochResult]] = {}
        self._due: list[tuple[float, int]] = []  # a heap
        self._begun = time.monotonic()
        self.idle, self.late, self.reports = 0.0, 0.0, 0

    @property
    def free(self) -> int:
        """Workers without a job."""
        return self._workers - len(self._jobs)

    def submit(self, job: Job | Measure) -> None:
        """Its first report is due within a second; workers are not in step."""
        assert isinstance(job, Job)
        epochs = made_up(job)
        phase = (job.number * 0.618) % 1.0  # the golden ratio's multiples fill [0, 1) evenly
        if job.number < self._workers:
            epochs = itertools.islice(epochs, 1 + int(phase * job.recipe.epochs))
        self._jobs[job.number] = epochs
        heapq.heappush(self._due, (time.monotonic() + phase * INTERVAL, job.number))

    def event_within(self, seconds: float) -> bool:
        """Sleeps until a report is due, or for so long."""
        now = time.monotonic()
        wait = self._due[0][0] - now if self._due else seconds
        if wait > 0:
            time.sleep(min(wait, seconds))
            self.idle += time.monotonic() - now
        return bool(self._due) and self._due[0][0] <= time.monotonic()

    @overload
    def next_event(self) -> Event: ...

    @overload
    def next_event(self, seconds: float) -> Event | None: ...

    def next_event(self, seconds: float | None = None) -> Event | None:
        """The report that is due for the longest time."""
        if not self.event_within(3600.0 if seconds is None else seconds):
            return None
        due, number = heapq.heappop(self._due)
        result = next(self._jobs[number], None)
        if result is None:
            del self._jobs[number]
            return Finished(number)
        self.reports += 1
        self.late = time.monotonic() - due
        heapq.heappush(self._due, (due + INTERVAL, number))
        return EpochDone(number, result)

    def answer(self, job: int, go_on: bool) -> None:
        """One that is stopped has no more epochs."""
        if not go_on:
            self._jobs[job] = iter(())

    def pause(self) -> None:
        """Not asked for."""

    def kill(self, job: int) -> None:
        """Not asked for."""

    def close(self) -> None:
        """Nothing to end."""


def measure_reports(
    url: str | None, folder: Path, workers: int, seconds: float, sampler: str,
    progress: Callable[[str, int, int], None],
) -> ReportsHeld:  # fmt: skip
    """Searches for so long with simulated workers; what it wrote is deleted.

    `url` is a database server's; None: a SQLite file in `folder`.
    """
    from caltech_hpo.search.space import Binding
    from caltech_hpo.search.storage import open_storage, open_study
    from caltech_hpo.search.supervisor import Supervisor
    from caltech_hpo.search.urls import default_url, parse_url
    from caltech_hpo.search.write_through import hold

    spec = overhead_spec(EPOCHS)
    spec = spec.model_copy(update={"sampler": spec.sampler.model_copy(update={"name": sampler})})
    name = f"bench-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        storage = open_storage(url or default_url(Path(scratch)))
        study = open_study(storage, name, spec, "made up", sampler_seed=0, allow_changed=False)
        try:
            held, store = hold(study, storage)
            spent = {"ask": 0.0, "flush": 0.0}
            for step in ("infer_relative_search_space", "sample_relative", "sample_independent"):
                vars(held.sampler)[step] = _timed(getattr(held.sampler, step), spent, "ask")
            vars(store)["flush"] = _timed(store.flush, spent, "flush")
            executor = SimulatedWorkers(workers)
            binding = Binding(classes=101, data="made up", seed=0, precision="fp32")
            begin, shown = time.monotonic(), 0
            events = Supervisor(held, store, spec, executor, binding).run(10**9)
            for _ in events:
                passed = time.monotonic() - begin
                if int(passed) != shown:
                    shown = int(passed)
                    progress(
                        f"{workers} simulated workers, {sampler}", min(shown, int(seconds)), int(seconds)
                    )
                if passed > seconds:
                    break
            taken, trials = time.monotonic() - begin, len(held.get_trials(deepcopy=False))
            events.close()
        finally:
            storage.delete_study(study._study_id)
    return ReportsHeld(
        database=parse_url(url or "sqlite://").get_backend_name(), sampler=sampler, workers=workers,
        seconds=taken, offered=workers / INTERVAL, held=executor.reports / taken, late=executor.late,
        trials=trials, sampling=spent["ask"] / taken, writing=spent["flush"] / taken,
        idle=executor.idle / taken,
    )  # fmt: skip


def _timed(call: Callable[..., object], spent: dict[str, float], key: str) -> Callable[..., object]:
    def timed(*args: object, **options: object) -> object:
        begin = time.monotonic()
        try:
            return call(*args, **options)
        finally:
            spent[key] += time.monotonic() - begin

    return timed
