"""What a search will cost in time, memory and disk, from a few steps timed where it will run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.loading import SearchData, described, load_search_data, split_sizes
from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.search.costs import Costs
from caltech_hpo.search.executors import Executor
from caltech_hpo.search.forecast import Forecast, Forecaster
from caltech_hpo.search.messages import Died, Failed, Measure, Measured, Working
from caltech_hpo.search.records import TrialRecord, finished_count, trial_records
from caltech_hpo.search.request import Place, Say, SearchRequest, sharing, silent
from caltech_hpo.search.space import Binding, recipe_for
from caltech_hpo.spec import Recipe, StudySpec
from caltech_hpo.timings import StepTime

PLAN_SECONDS = 60.0  # no further kind is timed after them
SEARCH_SECONDS, SEARCH_SECONDS_GPU = 15.0, 1.0  # likewise, of a search
CHECKPOINTS = 3  # of a trial: the last one, the one before, the one that is being written
ENOUGH_TRIALS = 3  # finished ones, that say more than timed steps
NOTHING = Forecast(0.0, 0.0, 0.0, 0, 0.0, 0.0, 0)  # no trial is to come
MEASURE = -1  # the job's number, and those below: no trial has them


@dataclass(frozen=True)
class Plan:
    """What is to be expected of a study on this machine. Bytes; `timed` are the kinds that were timed.

    `memory` is the most that the timing took, times the workers; `checkpoints` the most that those of all
    workers take while they train. Workers share one device: they are not counted on to be faster than one
    that has it to itself. The `forecast` counts from the search's beginning, with the `start` seconds before
    its first trial; `untimed` kinds of training are taken for the nearest timed one. Where no trial is to
    come, since the study has its `finished` ones, nothing was looked at.
    """

    study: str
    trials: int
    finished: int
    forecast: Forecast
    workers: int = 0
    device: str = ""
    start: float = 0.0
    timed: tuple[StepTime, ...] = ()
    untimed: int = 0
    epoch_seconds: tuple[float, ...] = ()
    memory: int = 0
    pixels: int = 0
    features: int = 0
    weights: int = 0
    checkpoints: int = 0


def make_plan(
    request: SearchRequest, place: Place, *, progress: Progress | None = None, say: Say = silent
) -> Plan:
    """Times a few steps; the study, if there is one, is only read. Raises as a search would."""
    from caltech_hpo.data.dataset import scan
    from caltech_hpo.search.request import resolve_spec
    from caltech_hpo.search.run import locate_data
    from caltech_hpo.search.storage import find_study, open_existing

    spec = resolve_spec(request)
    say(f"study {request.study}: opening it and its images")
    stored = find_study(open_existing(place.storage), request.study)
    records = trial_records(stored) if stored is not None else []
    finished = finished_count(records)
    if finished >= request.trials:
        return Plan(request.study, request.trials, finished, NOTHING)
    index = scan(locate_data(spec, place, progress=progress, say=say))
    data = load_search_data(
        index, spec.recipe.resize, place.cache, skip_unreadable=request.skip_unreadable, progress=progress
    )
    # as many as a search starts
    workers = min(request.workers, request.trials - finished)
    say(described(index.root, data))
    say("starting a worker")
    examples = Forecaster(spec, records, Costs((), (0, 0)), baselines=request.baselines).examples()
    measured, device, start = _measured(request, place, spec, examples, data, workers, progress)
    if _to_time(spec, records, request, device):
        start += _timing_seconds(measured, device)
    if measured.problem:
        say(f"not all of it could be timed: {measured.problem}")
    times, images = measured.times, split_sizes(data)
    costs = Costs(times, images)
    forecaster = Forecaster(
        spec, records, costs, pruning=request.pruning, baselines=request.baselines, device=device
    )
    forecast = forecaster.forecast(request.trials)
    assert forecast is not None, "kinds were timed"
    views = {
        (one.kind.freeze, one.kind.frozen_blocks): one.kept * (one.kind.views * images[0] + images[1])
        for one in sorted(times, key=lambda one: one.kind.views)
    }
    return Plan(
        request.study, request.trials, finished, forecast.later(start), workers, device, start, times,
        len(examples) - len(times), tuple(costs.epoch(one.kind) for one in times),
        memory=workers * measured.peak,
        pixels=sum(path.stat().st_size for path in (data.training_cache, data.validation_cache)),
        features=sum(views.values()), weights=max(one.weights for one in times),
        checkpoints=workers * CHECKPOINTS * max(one.checkpoint for one in times),
    )  # fmt: skip


def _measured(
    request: SearchRequest, place: Place, spec: StudySpec, examples: Sequence[dict[str, Any]],
    data: SearchData, workers: int, progress: Progress | None,
) -> tuple[Measured, str, float]:  # fmt: skip
    """Steps of the `examples` timed by one worker, with the memory that one of `workers` would have.

    Also its device, and in how many seconds it was ready.
    """
    from caltech_hpo.search.run import open_executor
    from caltech_hpo.search.space import most_demanding

    began = time.monotonic()
    with open_executor(
        most_demanding(spec), data, device=request.device, features=place.features,
        memory=None if request.memory is None else request.memory // workers, progress=progress,
    ) as executor:  # fmt: skip
        device, start = executor.ready.device, time.monotonic() - began
        binding = binding_of(executor, data, request)
        recipes = [recipe_for(spec, params, binding) for params in examples]
        measured = time_kinds(executor, recipes, PLAN_SECONDS, progress)
    if not measured.times:
        raise _no_step(request.study, measured)
    return measured, device, start


def _no_step(study: str, measured: Measured) -> CaltechHpoError:
    return CaltechHpoError(
        f"study '{study}': no step of it could be timed: {measured.problem}",
        "for lack of memory use fewer --workers, more --memory, or a smaller crop; else look: "
        f"caltech-hpo search --study {study} --smoke",
    )


def _search_seconds(device: str) -> float:
    return SEARCH_SECONDS_GPU if device.startswith("cuda") else SEARCH_SECONDS


def _timing_seconds(measured: Measured, device: str) -> float:
    """What a search takes to time the same: it stops with the first kind that exceeds its time."""
    most = _search_seconds(device)
    return next((passed for passed in measured.elapsed if passed > most), measured.elapsed[-1])


def _to_time(
    spec: StudySpec, records: Sequence[TrialRecord], request: SearchRequest, device: str
) -> list[dict[str, Any]]:  # fmt: skip
    """Parameters of the trainings whose steps a search times: none where enough was trained on its device."""
    here = [record for record in records if record.device in ("", device)]
    if finished_count(here) >= ENOUGH_TRIALS or request.subset is not None:
        return []
    return Forecaster(spec, here, Costs((), (0, 0)), baselines=request.baselines).unseen()


def binding_of(executor: Executor, data: SearchData, request: SearchRequest) -> Binding:
    """What recipes need besides the study's values."""
    ready = executor.ready
    return Binding(
        classes=len(data.classes), data=data.fingerprint, seed=request.seed, precision=ready.precision,
        weights_sha256=ready.weights_sha256,
    )  # fmt: skip


def forecaster_for(
    executor: Executor, spec: StudySpec, records: Sequence[TrialRecord], data: SearchData,
    request: SearchRequest, workers: int, progress: Progress | None,
) -> Forecaster:  # fmt: skip
    """What a search by so many `workers` shows its time left by.

    What was trained on this device needs no timing.
    """
    costs, device = Costs((), split_sizes(data)), executor.ready.device
    if examples := _to_time(spec, records, request, device):
        binding = binding_of(executor, data, request)
        recipes = [recipe_for(spec, params, binding) for params in examples]
        on_gpu = device.startswith("cuda")
        if on_gpu:
            warm_up(executor, recipes, progress)
        measured = time_kinds(executor, recipes, _search_seconds(device), progress)
        if measured.elapsed and not measured.times:  # no kind found memory: three trials would fail for it
            raise _no_step(request.study, measured)
        times = measured.times
        if on_gpu:  # the steps were timed while its other workers waited
            times = tuple(one.times(sharing(workers, request.cluster)) for one in times)
        costs = Costs(times, costs.images)
    return Forecaster(
        spec, records, costs, pruning=request.pruning, baselines=request.baselines, parallel=workers,
        device=device,
    )  # fmt: skip


def time_kinds(
    executor: Executor, recipes: Sequence[Recipe], seconds: float, progress: Progress | None
) -> Measured:  # fmt: skip
    """Step times of the recipes, the first ones where time is short; none where a step cannot be taken.

    That is no error here: the trial itself will say what is wrong. None either where no worker is free: a
    cluster's may be lost with their machine.
    """
    if not executor.free:
        return Measured(MEASURE, ())
    executor.submit(Measure(MEASURE, tuple(recipes), seconds))
    return next(_answers(executor, 1, progress))


def warm_up(executor: Executor, recipes: Sequence[Recipe], progress: Progress | None) -> None:
    """Lets all free workers at once take the first steps of a recipe each.

    What a GPU's first steps wait for (libraries that are loaded, kernels that are compiled and chosen) is
    over in every worker then: each would have it in its first trial, after waiting for the timing.
    """
    workers = executor.free
    for place in range(workers):
        executor.submit(Measure(MEASURE - place, (recipes[place % len(recipes)],), 0.0))
    for done, _ in enumerate(_answers(executor, workers, None), 1):
        if progress:
            progress("workers that have taken their first steps", done, workers)


def _answers(executor: Executor, jobs: int, progress: Progress | None) -> Iterator[Measured]:
    """What so many `Measure` jobs end with."""
    while jobs:
        event = executor.next_event()
        if isinstance(event, Working) and progress:
            progress(event.what, event.done, event.total)
        elif isinstance(event, (Measured, Failed, Died)):
            jobs -= 1
            yield event if isinstance(event, Measured) else Measured(event.job, (), problem=event.reason)
