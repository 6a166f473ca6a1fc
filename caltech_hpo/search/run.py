"""From a request to a running supervisor: data, database, lock, workers, in the order that refuses early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.dataset import DatasetIndex, scan
from caltech_hpo.data.decode import usable_cores
from caltech_hpo.errors import UsageError
from caltech_hpo.search.changes import check_unchanged
from caltech_hpo.search.locks import Check, search_lock
from caltech_hpo.search.request import (
    Cluster,
    Place,
    Say,
    SearchRequest,
    never,
    resolve_spec,
    sharing,
    silent,
)
from caltech_hpo.search.spawning import Early, dismiss, started_early
from caltech_hpo.search.storage import find_study, open_existing, open_storage, open_study
from caltech_hpo.spec import Hyperparameters, StudySpec
from caltech_hpo.study_checks import warnings_of
from caltech_hpo.study_files import complete_params

if TYPE_CHECKING:
    import optuna

    from caltech_hpo.data.loading import SearchData
    from caltech_hpo.search.events import SearchEvent
    from caltech_hpo.search.executors import Executor
    from caltech_hpo.search.forecast import Forecaster
    from caltech_hpo.search.records import TrialRecord


@dataclass(frozen=True)
class Search:
    """A search that is about to begin; `records` are the trials it finds.

    `events` is empty, and `device` and `workers` too, when the study has its trials already; else
    `forecaster` says how long it will take, and learns from the events it is given.
    """

    spec: StudySpec
    records: list[TrialRecord]
    events: Iterator[SearchEvent]
    device: str = ""
    workers: int = 0
    forecaster: Forecaster | None = None

    @property
    def finished(self) -> int:
        """Complete and pruned trials at the beginning."""
        from caltech_hpo.search.records import finished_count

        return finished_count(self.records)


def locate_data(
    spec: StudySpec, place: Place, *, progress: Progress | None = None, say: Say = silent
) -> Path:
    """The study's data folder: --data, its own, the demo's digits (written), or Caltech-101 (fetched)."""
    from caltech_hpo.data.download import ARCHIVE_URL, fetch_caltech101, write_demo

    if place.data is not None:
        return place.data
    if spec.data == "demo":
        return write_demo(place.datasets, progress=progress)
    if spec.folder:
        return Path(spec.folder)
    if spec.data == "folder":
        raise UsageError(
            f"study '{spec.name}' names no data set",
            'give the folder of class folders: --data DIR, or folder = "DIR" in its file',
        )
    if not (place.datasets / "caltech101").is_dir():
        say(f"no data in {place.datasets / 'caltech101'}: fetching Caltech-101 from {ARCHIVE_URL}")
    return fetch_caltech101(place.datasets, progress=progress)


@contextlib.contextmanager
def open_search(
    request: SearchRequest, place: Place, *, progress: Progress | None = None, say: Say = silent,
    stop: Callable[[], bool] = never,
) -> Iterator[Search]:  # fmt: skip
    """Everything up to the first trial; closing it ends the workers and releases the study.

    Once `stop` says True the events end soon, and the running trials wait for the next search.

    Refuses before any training: faulty specs, a changed study, a study that another search holds,
    missing data, unreadable images, missing weights.
    """
    spec = resolve_spec(request)
    for warning in warnings_of(spec):
        say(f"warning: {warning}")
    say(f"study {request.study}: opening it and its images")
    # While Optuna is imported and the images are looked at. More than there are cores to import would keep a
    # refusal waiting.
    soon = min(request.workers, request.trials, usable_cores()) if request.cluster is None else 0
    with (
        started_early(soon) as early,
        search_lock(place.storage, place.home, request.study) as check_lock,
    ):
        from caltech_hpo.search.records import trial_records
        from caltech_hpo.search.supervisor import FINISHED

        stored = find_study(open_existing(place.storage), request.study)
        finished = 0
        if stored is not None:
            check_unchanged(stored, request.study, spec, data=None, allow_changed=request.allow_changed)
            # counted by the database: reading 1,000 trials takes seconds
            finished = stored._storage.get_n_trials(stored._study_id, FINISHED)
        workers = max(0, min(request.workers, request.trials - finished))
        dismiss(early, keep=workers)
        if finished >= request.trials:
            yield Search(spec, trial_records(stored) if stored else [], iter(()))
            return
        index = scan(locate_data(spec, place, progress=progress, say=say))
        if stored is not None:
            check_unchanged(
                stored, request.study, spec, index.fingerprint, allow_changed=request.allow_changed
            )
        yield from _run(request, place, spec, index, workers, early, check_lock, progress, say, stop)


def _run(
    request: SearchRequest, place: Place, spec: StudySpec, index: DatasetIndex, workers: int, early: Early,
    check_lock: Check, progress: Progress | None, say: Say, stop: Callable[[], bool],
) -> Iterator[Search]:  # fmt: skip
    from caltech_hpo.data.loading import described, left_out, load_search_data
    from caltech_hpo.search.planning import binding_of, forecaster_for
    from caltech_hpo.search.records import trial_records
    from caltech_hpo.search.space import most_demanding
    from caltech_hpo.search.sqlite import use_safe_journal
    from caltech_hpo.search.supervisor import Supervisor
    from caltech_hpo.search.write_through import hold

    data = load_search_data(
        index, spec.recipe.resize, place.cache,
        skip_unreadable=request.skip_unreadable, subset=request.subset, progress=progress,
    )  # fmt: skip
    if missing := left_out(data.caches):
        say(missing)
    say(described(index.root, data))
    storage = open_storage(place.storage)
    use_safe_journal(storage.engine)
    say(f"starting {workers} worker{'s' if workers > 1 else ''}")
    with open_executor(
        most_demanding(spec),
        data,
        device=request.device,
        workers=workers,
        share=request.workers,
        features=place.features,
        memory=request.memory,
        cluster=request.cluster,
        mark=place.home / f".{request.study}.shared",
        progress=progress,
        early=early,
    ) as executor:
        study = open_study(
            storage, request.study, spec, index.fingerprint,
            sampler_seed=request.seed, allow_changed=request.allow_changed,
        )  # fmt: skip
        study, held_storage = hold(study, storage, check_lock)
        enqueue(study, [complete_params(spec, params) for params in request.enqueue], say)
        held_storage.flush()
        binding = binding_of(executor, data, request)
        records = trial_records(study)
        forecaster = forecaster_for(executor, spec, records, data, request, workers, progress)
        supervisor = Supervisor(
            study, held_storage, spec, executor, binding, baselines=request.baselines,
            pruning=request.pruning,
            checkpoints=place.checkpoints / request.study if request.checkpoints else None,
            models=place.best_weights,
            trial_seconds=None if request.trial_minutes is None else request.trial_minutes * 60,
        )  # fmt: skip
        seconds = None if request.timeout_minutes is None else request.timeout_minutes * 60
        events = supervisor.run(request.trials, seconds=seconds, stop=stop)
        try:
            yield Search(spec, records, events, executor.ready.device, workers, forecaster)
        finally:
            events.close()


def enqueue(study: optuna.Study, points: list[dict[str, Any]], say: Say) -> None:
    """Queues parameters that the study has not run yet; a failed run does not count."""
    for params in points:
        tried = [
            trial for trial in study.get_trials(deepcopy=False)
            if trial.state.name != "FAIL" and params in (trial.params, trial.system_attrs.get("fixed_params"))
        ]  # fmt: skip
        if tried:
            say(f"not queued: trial {tried[0].number} has these parameters: {params}")
        else:
            study.enqueue_trial(params)


@contextlib.contextmanager
def open_executor(
    recipe: Hyperparameters,
    data: SearchData,
    *,
    device: str,
    workers: int = 1,
    share: int | None = None,
    features: Path | None = None,
    memory: int | None = None,
    cluster: Cluster | None = None,
    mark: Path | None = None,
    progress: Progress | None = None,
    early: Early | None = None,
) -> Iterator[Executor]:
    """Local worker processes, or those of a cluster (by `mark` they see whether folders are shared).

    They are ended on leaving. Local ones are first those that were started `early`.

    Each has the cores of one of `share` (None: of `workers`): a trial that goes on when there are fewer
    workers computes with as many threads as before, or its sums would be rounded otherwise.
    """
    from caltech_hpo.search.executors import ProcessExecutor
    from caltech_hpo.search.messages import WorkerConfig

    share = share or workers
    threads = max(1, usable_cores() // share) if share > 1 else None
    config = WorkerConfig(data, device, threads, recipe, features, workers, memory)
    executor: Executor
    if cluster is None:
        executor = ProcessExecutor(config, workers, progress=progress, early=early)
    else:
        from caltech_hpo.search.ray_executor import RayExecutor

        assert mark is not None, "a cluster's workers look for it"
        theirs = replace(config, threads=max(1, int(cluster.cpus)), workers=sharing(workers, cluster))
        executor = RayExecutor(theirs, workers, cluster, mark, progress)
    try:
        yield executor
    finally:
        executor.close()
