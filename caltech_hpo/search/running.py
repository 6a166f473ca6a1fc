"""A trial that runs: what is known of it, when it is to end, what is written about it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from caltech_hpo.errors import StorageFullError
from caltech_hpo.search.events import NoRoom, TrialEnded, TrialUnderway, TrialWorking
from caltech_hpo.search.executors import Executor
from caltech_hpo.search.messages import Midway, Ready, Working
from caltech_hpo.search.pruning import divergence, lags
from caltech_hpo.search.records import BASELINE_ATTR, EPOCH_KEY
from caltech_hpo.search.write_through import WriteThroughStorage
from caltech_hpo.spec import EpochResult, PrunerSpec, Recipe, StudySpec

REPEATS_ATTR = "repeats_trial"
LAGGING = "lagging"
MOST_DEATHS = 3  # of workers that one training may cost
HUNG_EPOCHS, HUNG_AT_LEAST = 10, 300.0  # silence: in epochs, and in seconds
LOOK_EVERY = 1.0  # seconds between looks for hung workers
# Seconds after which nobody could have been heard: the search waited for room on the disk, or was suspended.
DEAF = 30.0
ROOM_EVERY = 10.0  # seconds between looks for room on the disk
UNBEGUN = "interrupted: its search ended before it began"


@dataclass
class Running:
    """A trial, its recipe, the hand-tuned row it repeats (or ""), its epochs so far.

    `began` here and was last `heard` of at these times (monotonic seconds).
    """

    trial: optuna.Trial
    recipe: Recipe
    baseline: str
    results: list[EpochResult] = field(default_factory=list)
    stop_reason: str = ""
    began: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)

    @property
    def best(self) -> EpochResult | None:
        """The first of the epochs with the highest validation accuracy."""
        return max(self.results, key=lambda result: result.validation_top1 or 0.0, default=None)


def verdict(running: Running, pruner: PrunerSpec, *, exempt: bool, seconds: float | None = None) -> str:
    """Why the trial is to end after its latest epoch, which was reported, or ""; lagging unless `exempt`."""
    latest = running.results[-1]
    diverged = divergence(running.results)
    if diverged or latest.epoch == running.recipe.epochs:
        return diverged
    if not exempt and lags(running.trial, running.results, running.recipe.epochs, pruner):
        return f"{LAGGING}: {pruner.name} pruner at epoch {latest.epoch}"
    if seconds is not None and time.monotonic() - running.began > seconds:
        return f"timed out: more than {seconds / 60:g} minutes at epoch {latest.epoch}"
    return ""


def written(storage: WriteThroughStorage, stop: Callable[[], bool]) -> Iterator[NoRoom]:
    """Writes what has changed; where there is no room, says so and waits for it.

    Raises StorageFullError if it is asked to stop meanwhile.
    """
    said = False
    while True:
        try:
            storage.flush()
            return
        except StorageFullError as error:
            if stop():
                raise
            if not said:
                yield NoRoom(error.message)
            said = True
            time.sleep(ROOM_EVERY)


def slowest_epoch(trials: Iterable[optuna.trial.FrozenTrial]) -> float:
    """The seconds of the longest epoch of stored trials, 0 without one."""
    attributes = (trial.system_attrs for trial in trials)
    # Read as they are stored: whole records would be checked for this one figure.
    seconds = (one[key]["seconds"] for one in attributes for key in one if key.startswith(EPOCH_KEY))
    return max(seconds, default=0.0)


class HungWatch:
    """Kills workers that have been silent for ten epochs; their trials go on in others, at most twice.

    One that trains speaks every few seconds, and after each batch where a batch takes longer.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor, self._looked = executor, time.monotonic()

    def look(self, running: dict[int, Running], slowest: float) -> None:
        """Once a second; to be called whenever an event was handled, and while none comes.

        An epoch is the trial's median one; before its first, the `slowest` of the study. While none is known
        nothing counts as hung.
        """
        now = time.monotonic()
        since = now - self._looked
        if since < LOOK_EVERY:
            return
        self._looked = now
        for number, one in running.items():
            usual = statistics.median([r.seconds for r in one.results]) if one.results else slowest
            if since > DEAF:
                one.heard = now
            elif usual and now - one.heard > max(HUNG_AT_LEAST, HUNG_EPOCHS * usual):
                one.heard = now
                self._executor.kill(number)


def progress_of(event: Midway) -> TrialWorking | TrialUnderway:
    """What a worker says of its trial between epochs, for the search's caller."""
    if isinstance(event, Working):
        return TrialWorking(event.job, event.what, event.done, event.total)
    return TrialUnderway(event.job, event.part)


def attributes_of(running: Running, ready: Ready, stop_reason: str) -> dict[str, Any]:
    """What a trial's user attributes say when it has ended."""
    results, best = running.results, running.best
    loss = results[-1].training_loss if results else None
    attributes: dict[str, Any] = {
        "epochs_run": len(results),
        "best_epoch": best.epoch if best else None,
        # as text when infinite: JSON has no such number, and the dashboard would not parse it
        "final_loss": loss if loss is None or math.isfinite(loss) else str(loss),
        "seconds": round(sum(result.seconds for result in results), 3),
        "device": ready.device,
        "precision": running.recipe.precision,
        "versions": ready.versions,
        "stop_reason": stop_reason,
    }
    if results and results[-1].micro_batch:
        attributes["micro_batch"] = results[-1].micro_batch
    return attributes


def tell(running: Running, ready: Ready, state: TrialState, reason: str) -> TrialEnded:
    """Ends a trial: its attributes first, then its state and the best accuracy over its epochs."""
    for name, value in attributes_of(running, ready, reason).items():
        running.trial.set_user_attr(name, value)
    best = running.best
    score = (best.validation_top1 or 0.0) if best else None
    if state == TrialState.COMPLETE:
        running.trial.study.tell(running.trial, score)
    else:
        running.trial.study.tell(running.trial, state=state)
    name = "failed" if state == TrialState.FAIL else state.name.lower()
    return TrialEnded(running.trial.number, name, None if name == "failed" else score, reason)


def give_back(study: optuna.Study, spec: StudySpec, trial: optuna.trial.FrozenTrial, baseline: str) -> None:
    """Queues the parameters of a trial that was asked for and never began, and marks it failed."""
    # A queued trial that died while it was asked for has its parameters in the queue's own record.
    known = trial.system_attrs.get("fixed_params", {}) | trial.params
    params = {name: value for name, value in known.items() if name in spec.space}
    others = study.get_trials(deepcopy=False)
    repeated = any(other.user_attrs.get(REPEATS_ATTR) == trial.number for other in others)
    # repeated: an earlier attempt to give it back died before it could tell
    if len(params) == len(spec.space) and not repeated:
        attributes: dict[str, Any] = {REPEATS_ATTR: trial.number}
        if baseline:
            attributes[BASELINE_ATTR] = baseline
        study.enqueue_trial(params, user_attrs=attributes)
    optuna.Trial(study, trial._trial_id).set_user_attr("stop_reason", UNBEGUN)
    study.tell(trial.number, state=TrialState.FAIL)
