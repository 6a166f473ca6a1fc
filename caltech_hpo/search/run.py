"""From a request to a running supervisor: data, database, lock, workers, in the order that refuses early."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.dataset import DatasetIndex, scan
from caltech_hpo.errors import UsageError
from caltech_hpo.search.changes import check_unchanged
from caltech_hpo.search.storage import find_study, open_existing, open_storage, open_study, study_lock
from caltech_hpo.spec import Hyperparameters, Precision, StudySpec
from caltech_hpo.study_files import complete_params, describe, load_study

if TYPE_CHECKING:
    from caltech_hpo.data.loading import SearchData
    from caltech_hpo.search.executors import ProcessExecutor
    from caltech_hpo.search.records import TrialRecord
    from caltech_hpo.search.supervisor import SearchEvent

SMOKE_EPOCHS = 2
Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where things are kept: the home folder and the study database's URL.

    `data` is the folder that replaces a study's own data set.
    """

    home: Path
    storage: str
    data: Path | None = None
    scratch: Path | None = None  # a smoke run's throw-away folder for cache and lock

    @property
    def cache(self) -> Path:
        """Decoded pixels."""
        return (self.scratch or self.home) / "cache"

    @property
    def locks(self) -> Path:
        """One lock file a study."""
        return (self.scratch or self.home) / "locks"

    @property
    def datasets(self) -> Path:
        """Fetched data sets."""
        return self.home / "datasets"

    @property
    def models(self) -> Path:
        """What `final` writes."""
        return self.home / "models"


@dataclass(frozen=True)
class SearchRequest:
    """What `search` was asked to do. `trials` is the study's total of finished trials."""

    study: str
    trials: int
    workers: int = 1
    device: str = "auto"
    seed: int = 0
    timeout_minutes: float | None = None
    baselines: bool = True
    enqueue: tuple[dict[str, Any], ...] = ()
    allow_changed: bool = False
    skip_unreadable: bool = False
    precision: Precision | None = None
    weights: str | None = None
    subset: int | None = None


@dataclass(frozen=True)
class Search:
    """A search that is about to begin; `records` are the trials it finds.

    `events` is empty and `device` too when the study has its trials already.
    """

    spec: StudySpec
    records: list[TrialRecord]
    events: Iterator[SearchEvent]
    device: str = ""

    @property
    def finished(self) -> int:
        """Complete and pruned trials at the beginning."""
        from caltech_hpo.search.records import finished_count

        return finished_count(self.records)


def locate_data(spec: StudySpec, place: Place, *, progress: Progress | None = None, say: Say = print) -> Path:
    """The study's data folder: --data, the demo's digits (written), or Caltech-101 (fetched)."""
    from caltech_hpo.data.download import ARCHIVE_URL, fetch_caltech101, write_demo

    if place.data is not None:
        return place.data
    if spec.data == "demo":
        return write_demo(place.datasets, progress=progress)
    if spec.data == "folder":
        raise UsageError(
            f"study '{spec.name}' names no data set", "give the folder of class folders: --data DIR"
        )
    if not (place.datasets / "caltech101").is_dir():
        say(f"no data in {place.datasets / 'caltech101'}: fetching Caltech-101 from {ARCHIVE_URL}")
    return fetch_caltech101(place.datasets, progress=progress)


def resolve_spec(request: SearchRequest) -> StudySpec:
    """The study file with the request's overrides. Raises UsageError and SpecError."""
    spec = load_study(request.study)
    changes = {"precision": request.precision, "weights": request.weights}
    given = {name: value for name, value in changes.items() if value is not None}
    if given:
        spec = spec.model_copy(update={"recipe": spec.recipe.model_copy(update=given)})
    for params in request.enqueue:
        check_enqueued(spec, params)
    return spec if request.subset is None else shortened(spec)


def check_enqueued(spec: StudySpec, params: dict[str, Any]) -> None:
    """Numbers may lie outside the space (the user knows), but must be possible; choices must be listed."""
    unknown = [name for name in params if name not in spec.space]
    if unknown:
        raise UsageError(
            f"--enqueue: {', '.join(unknown)} not in the space of '{spec.name}'",
            f"its space: {', '.join(spec.space)}",
        )
    for name, value in params.items():
        choices = getattr(spec.space[name], "choices", None)
        if choices is not None and value not in choices:
            raise UsageError(f"--enqueue: {name}={value} is not one of {', '.join(map(str, choices))}")
    try:
        Hyperparameters.model_validate({**spec.recipe.model_dump(), **params})
    except ValidationError as error:
        raise UsageError("; ".join(describe(error, "--enqueue"))) from error


@contextlib.contextmanager
def open_search(
    request: SearchRequest, place: Place, *, progress: Progress | None = None, say: Say = print
) -> Iterator[Search]:
    """Everything up to the first trial; closing it ends the workers and releases the study.

    Refuses before any work: faulty specs, a changed study, a study that another search holds,
    missing data, unreadable images, missing weights.
    """
    from caltech_hpo.search.records import finished_count, trial_records

    spec = resolve_spec(request)
    existing = open_existing(place.storage)
    with study_lock(place.locks, request.study):
        stored = find_study(existing, request.study)
        if stored is not None:
            check_unchanged(stored, request.study, spec, data=None, allow_changed=request.allow_changed)
            records = trial_records(stored)
            if finished_count(records) >= request.trials:
                yield Search(spec, records, iter(()))
                return
        index = scan(locate_data(spec, place, progress=progress, say=say))
        if stored is not None:
            check_unchanged(
                stored, request.study, spec, index.fingerprint, allow_changed=request.allow_changed
            )
        yield from _run(request, place, spec, index, progress, say)


def _run(
    request: SearchRequest, place: Place, spec: StudySpec, index: DatasetIndex,
    progress: Progress | None, say: Say,
) -> Iterator[Search]:  # fmt: skip
    from caltech_hpo.data.loading import load_search_data
    from caltech_hpo.search.records import trial_records
    from caltech_hpo.search.space import Binding
    from caltech_hpo.search.supervisor import Supervisor

    data = load_search_data(
        index, spec.recipe.resize, place.cache,
        skip_unreadable=request.skip_unreadable, subset=request.subset, progress=progress,
    )  # fmt: skip
    storage = open_storage(place.storage)
    say(f"starting {request.workers} worker{'s' if request.workers > 1 else ''}")
    with open_executor(spec.recipe, data, device=request.device, workers=request.workers) as executor:
        study = open_study(
            storage, request.study, spec, index.fingerprint,
            sampler_seed=request.seed, allow_changed=request.allow_changed,
        )  # fmt: skip
        for params in request.enqueue:
            study.enqueue_trial(complete_params(spec, params), skip_if_exists=True)
        binding = Binding(
            classes=len(data.classes), data=data.fingerprint, seed=request.seed,
            precision=executor.ready.precision, weights_sha256=executor.ready.weights_sha256,
        )  # fmt: skip
        supervisor = Supervisor(study, storage, spec, executor, binding, baselines=request.baselines)
        seconds = None if request.timeout_minutes is None else request.timeout_minutes * 60
        events = supervisor.run(request.trials, seconds=seconds)
        try:
            yield Search(spec, trial_records(study), events, executor.ready.device)
        finally:
            events.close()  # gives trials still running back to the queue


@contextlib.contextmanager
def open_executor(
    recipe: Hyperparameters, data: SearchData, *, device: str, workers: int = 1
) -> Iterator[ProcessExecutor]:
    """Local worker processes, sharing the CPU's cores evenly; ended on leaving."""
    from caltech_hpo.search.executors import ProcessExecutor
    from caltech_hpo.search.messages import WorkerConfig

    threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None
    config = WorkerConfig(data, device, threads, recipe.architecture, recipe.weights)
    executor = ProcessExecutor(config, workers)
    try:
        yield executor
    finally:
        executor.close()


def shortened(spec: StudySpec) -> StudySpec:
    """The spec of a smoke run: every trial has 2 epochs, and only the first baseline is run."""
    baselines = [
        row.model_copy(update={"params": {k: v for k, v in row.params.items() if k != "epochs"}})
        for row in spec.baselines[:1]
    ]
    return spec.model_copy(
        update={
            "recipe": spec.recipe.model_copy(update={"epochs": SMOKE_EPOCHS}),
            "space": {name: dimension for name, dimension in spec.space.items() if name != "epochs"},
            "baselines": tuple(baselines),
        }
    )
