"""Retrains what `final` has no score of, several seeds at once, and scores each as its training ends."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from caltech_hpo.data.cache import Progress
from caltech_hpo.errors import StorageError
from caltech_hpo.results.final import (
    FinalData,
    checkpoint_of,
    final_lock,
    is_settled,
    load_data,
    restore,
    score,
    taken_meanwhile,
)
from caltech_hpo.results.ledger import FinalResult
from caltech_hpo.results.model_files import WEIGHTS, has_weights
from caltech_hpo.results.plan import FinalPlan
from caltech_hpo.results.trainings import Began, train_each
from caltech_hpo.search.locks import Check
from caltech_hpo.search.messages import EpochDone, EpochPart, Job, Underway
from caltech_hpo.search.request import Say, silent
from caltech_hpo.search.run import open_executor
from caltech_hpo.spec import EpochResult


@dataclass(frozen=True)
class RetrainingPlanned:
    """What is to be trained; the others have their score."""

    plans: tuple[FinalPlan, ...]


@dataclass(frozen=True)
class RetrainingStarted:
    """A worker trains the plan's recipe; `resumed`: from a checkpoint, the epochs before it come again.

    `lost`: it had begun, but its worker was killed.
    """

    plan: FinalPlan
    resumed: bool
    lost: bool = False


@dataclass(frozen=True)
class RetrainingUnderway:
    """Where its training is."""

    plan: FinalPlan
    part: EpochPart


@dataclass(frozen=True)
class RetrainingEpoch:
    """An epoch of it; one from `before` the checkpoint is told again."""

    plan: FinalPlan
    result: EpochResult
    before: bool = False


@dataclass(frozen=True)
class ScoringStarted:
    """It is trained; the test set is looked at."""

    plan: FinalPlan


@dataclass(frozen=True)
class Scored:
    """The plan's score: from `before` (another call may have taken it meanwhile), or taken `now`.

    Without the scoring of anything: `lost` has its score but no weights any more, `restored` has them again.
    """

    plan: FinalPlan
    result: FinalResult
    how: Literal["before", "now", "lost", "restored"]


FinalEvent = (
    RetrainingPlanned | RetrainingStarted | RetrainingUnderway | RetrainingEpoch | ScoringStarted | Scored
)


def run_finals(
    plans: Sequence[FinalPlan], *, device: str, workers: int = 1, memory: int | None = None,
    retrain: bool = False, skip_unreadable: bool = False, allow_leak: bool = False,
    progress: Progress | None = None, say: Say = silent,
) -> Generator[FinalEvent, None, None]:  # fmt: skip
    """Ends with a `Scored` for each of a study's plans, which differ in their seeds alone.

    Trains in workers, keeping the best epoch's weights in the folder being made ("train" keeps the best
    validation epoch, "train+val" the last one). One that was interrupted goes on from its checkpoint. All
    workers together may use `memory` bytes (None: most of what is free). With `retrain`, weights of scored
    recipes that are gone are trained again. Raises CaltechHpoError when a training fails (the others keep
    their checkpoints), DataError before any begins as `load_data` does, and what `taken_meanwhile` raises.
    """
    pending = []
    for plan in plans:
        lost = not has_weights(plan.folder)
        if plan.stored is None or not is_settled(plan) or (lost and retrain):
            pending.append(plan)
        else:
            yield Scored(plan, plan.stored, "lost" if lost else "before")
    if not pending:
        return
    with final_lock(pending[0]) as check:
        missing = []
        for plan in pending:
            taken = taken_meanwhile(plan)
            if taken is None or (retrain and not has_weights(plan.folder)):
                missing.append(replace(plan, stored=taken))
            else:
                yield Scored(plan, taken, "before")
        if missing:
            scoring = any(plan.stored is None for plan in missing)
            data = load_data(
                missing[0], scoring=scoring, skip_unreadable=skip_unreadable, allow_leak=allow_leak,
                progress=progress, say=say,
            )  # fmt: skip
            yield RetrainingPlanned(tuple(missing))
            share = min(workers, len(plans))  # also when it goes on with fewer
            yield from _trained(missing, data, check, device, share, memory, progress)


def _trained(
    plans: Sequence[FinalPlan], data: FinalData, check: Check, device: str, share: int,
    memory: int | None, progress: Progress | None,
) -> Generator[FinalEvent, None, None]:  # fmt: skip
    jobs = [
        # at the end too: whatever ends the call before the score, only scoring remains
        Job(number, plan.recipe, plan.unfinished / WEIGHTS, checkpoint_of(plan), checkpoint_at_end=True)
        for number, plan in enumerate(plans)
    ]
    recipe, features = plans[0].recipe, plans[0].place.features
    count = min(share, len(jobs))
    with open_executor(
        recipe, data.search, device=device, workers=count, share=share, features=features, memory=memory,
        progress=progress,
    ) as executor:  # fmt: skip
        for event in train_each(jobs, executor, progress=progress):
            plan = plans[event.job]
            if isinstance(event, Began):
                if not event.resumed:
                    shutil.rmtree(plan.unfinished, ignore_errors=True)
                yield RetrainingStarted(plan, event.resumed, event.lost)
            elif isinstance(event, Underway):
                yield RetrainingUnderway(plan, event.part)
            elif isinstance(event, EpochDone):
                yield RetrainingEpoch(plan, event.result, event.before)
            else:
                if not has_weights(plan.unfinished):
                    raise StorageError(
                        f"{plan.unfinished}: no room for the weights", "make room, then run it again"
                    )
                check()
                yield from _settled(plan, event.results, data, device)


def _settled(
    plan: FinalPlan, epochs: Sequence[EpochResult], data: FinalData, device: str
) -> Generator[FinalEvent, None, None]:
    if plan.stored is not None:
        restore(plan, epochs)
        yield Scored(plan, plan.stored, "restored")
    elif (taken := taken_meanwhile(plan)) is not None:
        yield Scored(plan, taken, "before")
    else:
        yield ScoringStarted(plan)
        yield Scored(plan, score(plan, epochs, data, device=device), "now")
