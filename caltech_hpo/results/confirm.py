"""Retrains a search's best trials over fresh seeds: the best of many noisy trials is partly luck."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.dataset import DatasetIndex
from caltech_hpo.data.loading import left_out, load_search_data
from caltech_hpo.errors import UsageError
from caltech_hpo.results.confirm_events import (
    ConfirmEvent,
    Training,
    TrainingEnded,
    TrainingEpoch,
    TrainingStarted,
    TrainingUnderway,
)
from caltech_hpo.results.ledger import now
from caltech_hpo.results.ranking import Candidate, Confirmation, candidates, rank
from caltech_hpo.results.runs_table import ConfirmRun, add_request, add_run, requests, runs
from caltech_hpo.results.trainings import SEEDS, Began, require_same_images, searched_data, seeded, train_each
from caltech_hpo.search.locks import confirm_lock, holders_of
from caltech_hpo.search.messages import EpochDone, Job, Underway
from caltech_hpo.search.pruning import divergence
from caltech_hpo.search.records import TrialRecord, trial_records
from caltech_hpo.search.request import Place, Say, silent
from caltech_hpo.search.run import open_executor
from caltech_hpo.search.storage import open_existing, open_storage, stored_study
from caltech_hpo.spec import EpochResult, Recipe
from caltech_hpo.training.checkpoint_files import remove_checkpoint

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

    from caltech_hpo.search.executors import Executor


@dataclass(frozen=True)
class ConfirmPlan:
    """What `confirm` is about to do; `open` are the trainings that are not in the database yet.

    They go seed by seed over the finalists, so that what an interruption leaves is paired. `index`
    is None when nothing is open: the data is then not looked at.
    """

    study: str
    place: Place
    finalists: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    open: tuple[Training, ...]
    index: DatasetIndex | None


def confirmed(url: str, study: str) -> Confirmation | None:
    """The ranking by the latest `confirm` of which at least one seed is whole; None without one.

    Reads only. Raises StorageError for a file that is no study database.
    """
    storage = open_existing(url)
    return None if storage is None else _ranking(storage, study)


def _ranking(storage: RDBStorage, study: str) -> Confirmation | None:
    done = runs(storage, study)
    values = {(run.configuration, run.seed): run.value for run in done}
    for request in requests(storage, study):
        diverged = Counter(
            run.configuration for run in done if run.stop_reason != "finished" and run.seed in request.seeds
        )
        ranking = rank(study, request.finalists, request.seeds, values, diverged)
        if ranking is not None:
            return ranking
    return None


def fresh_seeds(
    records: Sequence[TrialRecord], count: int, earlier: Sequence[int] = ()
) -> tuple[int, ...]:  # fmt: skip
    """`count` seeds that no trial was searched with: an earlier confirm's first, then those after them.

    Without an earlier one: the seeds after the highest of a trial.
    """
    searched = {record.recipe.seed for record in records if record.recipe is not None}
    seeds = [seed for seed in earlier if seed not in searched][:count]
    following = max([*seeds, *searched], default=0)
    while len(seeds) < count:
        following = (following + 1) % SEEDS
        if following not in searched and following not in seeds:
            seeds.append(following)
    return tuple(seeds)


@contextlib.contextmanager
def open_confirm(
    name: str, place: Place, *, finalists: int, seeds: int,
    progress: Progress | None = None, say: Say = silent,
) -> Iterator[ConfirmPlan]:  # fmt: skip
    """Chooses finalists and seeds, and holds the study's confirm lock.

    Seeds that were trained on before stay, though fewer be asked for, and so do finalists: choosing which
    count would be choosing by luck again.
    Raises UsageError without a stored study or a complete trial, DataError for other data, StorageError
    while another `confirm` of the study runs.
    """
    study = stored_study(place.storage, name)
    records = trial_records(study)
    chosen = candidates(records, finalists)
    if not chosen:
        raise UsageError(
            f"study '{name}' has no complete trial yet",
            f"run 'caltech-hpo search --study {name} --trials N' first",
        )
    if len(chosen) < finalists:
        say(f"study {name} has {len(chosen)} configurations with a complete trial, not {finalists}")
    if searcher := holders_of(place.storage, place.home, [name]).get(name):
        say(f"study {name} is being searched ({searcher}): what ends from now on is not among the finalists")
    recipes = {record.number: record.recipe for record in records}
    with confirm_lock(place.storage, place.home, name):
        storage = open_storage(place.storage)
        before, stored = requests(storage, name), runs(storage, name)
        earlier = before[0].seeds if before else ()
        known = {run.configuration for run in stored}
        among = {one.configuration for one in chosen}
        kept = [
            one for one in (before[0].finalists if before else ())
            if one.configuration in known - among and _is_that(one, recipes.get(one.trial))
        ]  # fmt: skip
        if kept:
            say(f"confirmed before, and still in the ranking: trials {', '.join(str(k.trial) for k in kept)}")
        chosen = sorted([*chosen, *kept], key=lambda one: (-one.value, one.trial))
        used = len({run.seed for run in stored} & set(earlier))
        if used > seeds:
            say(f"{used} seeds were confirmed before: all of them count")
        numbers = fresh_seeds(records, max(seeds, used), earlier)
        done = {run.recipe_hash for run in stored}
        trainings = [
            Training(one.trial, seeded(recipe, seed))
            for seed in numbers
            for one in chosen
            if (recipe := recipes[one.trial]) is not None
        ]
        pending = tuple(training for training in trainings if training.recipe.hash not in done)
        index = searched_data(study, place, progress=progress, say=say) if pending else None
        yield ConfirmPlan(name, place, tuple(chosen), numbers, pending, index)


def _is_that(one: Candidate, recipe: Recipe | None) -> bool:
    """Whether the trial is still the one that was confirmed: its study may have been deleted since."""
    return recipe is not None and recipe.configuration == one.configuration


def run_confirm(
    plan: ConfirmPlan, *, workers: int = 1, device: str = "auto", memory: int | None = None,
    skip_unreadable: bool = False, progress: Progress | None = None, say: Say = silent,
) -> Generator[ConfirmEvent, None, None]:  # fmt: skip
    """Runs what is open, and keeps each training as soon as it has finished.

    `memory` bytes may be used by all workers together (None: most of what is free).
    `plan` comes from `open_confirm`, which must still be open. Only training and validation images are
    loaded. Raises CaltechHpoError when a training fails; what had finished by then is kept.
    """
    storage = open_storage(plan.place.storage)
    add_request(storage, plan.study, plan.finalists, plan.seeds)
    # A study continued with --allow-changed may mix image sizes: each size has a pixel cache of its own.
    for resize in dict.fromkeys(training.recipe.resize for training in plan.open):
        assert plan.index is not None
        data = load_search_data(
            plan.index, resize, plan.place.cache, skip_unreadable=skip_unreadable, progress=progress
        )
        mine = [training for training in plan.open if training.recipe.resize == resize]
        for training in mine:
            require_same_images(training.recipe, data, plan.index)
        if missing := left_out(data.caches):
            say(missing)
        count, share = min(workers, len(mine)), min(workers, len(plan.finalists) * len(plan.seeds))
        with open_executor(
            mine[0].recipe, data, device=device, workers=count, share=share, features=plan.place.features,
            memory=memory, progress=progress,
        ) as executor:  # fmt: skip
            for event in train_all(plan, mine, executor, progress):
                if isinstance(event, TrainingEnded):
                    add_run(storage, event.run)
                yield event


def train_all(
    plan: ConfirmPlan, trainings: Sequence[Training], executor: Executor, progress: Progress | None = None
) -> Generator[ConfirmEvent, None, None]:  # fmt: skip
    """Runs the trainings in their order on all workers; one that diverges is stopped, and counts.

    One that was interrupted, or whose worker died, goes on from its checkpoint.
    """
    jobs = [
        Job(number, training.recipe, checkpoint=_checkpoint(plan, training.recipe))
        for number, training in enumerate(trainings)
    ]
    for event in train_each(jobs, executor, go_on=_goes_on, progress=progress):
        training = trainings[event.job]
        if isinstance(event, Began):
            yield TrainingStarted(training, event.resumed, event.lost)
        elif isinstance(event, Underway):
            yield TrainingUnderway(training, event.part)
        elif isinstance(event, EpochDone):
            yield TrainingEpoch(training, event.result, event.before)
        else:
            yield TrainingEnded(training, _run(plan.study, training, event.results))
            remove_checkpoint(_checkpoint(plan, training.recipe))


def _goes_on(results: Sequence[EpochResult]) -> bool:
    return not divergence(results)


def _checkpoint(plan: ConfirmPlan, recipe: Recipe) -> Path:
    return plan.place.checkpoints / plan.study / f"confirm-{recipe.hash}.checkpoint"


def _run(study: str, training: Training, results: Sequence[EpochResult]) -> ConfirmRun:
    recipe = training.recipe
    best = max(results, key=lambda result: result.validation_top1 or 0.0)
    return ConfirmRun(
        study=study, trial=training.trial, configuration=recipe.configuration,
        recipe_hash=recipe.hash, seed=recipe.seed, value=best.validation_top1 or 0.0,
        best_epoch=best.epoch, epochs_run=len(results),
        seconds=round(sum(result.seconds for result in results), 3),
        stop_reason=divergence(results) or "finished", finished_at=now(),
    )  # fmt: skip
