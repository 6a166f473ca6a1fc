"""The one process that owns a study: ask, dispatch, report, prune, tell. One loop over events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.search.events import (
    Requeued,
    SearchEvent,
    TrialEnded,
    TrialEpoch,
    TrialStarted,
    TrialWorking,
)
from caltech_hpo.search.executors import Executor
from caltech_hpo.search.messages import Died, EpochDone, Event, Failed, Job, WorkerBugError, Working
from caltech_hpo.search.pruning import divergence, lags
from caltech_hpo.search.records import BASELINE_ATTR, EPOCH_KEY, RECIPE_KEY
from caltech_hpo.search.space import Binding, recipe_for, suggest
from caltech_hpo.search.write_through import WriteThroughStorage
from caltech_hpo.spec import EpochResult, Recipe, StudySpec
from caltech_hpo.study_files import complete_params

FAILURES_IN_A_ROW = 3
REPEATS_ATTR = "repeats_trial"
LAGGING = "lagging"
# Epochs that come in a burst are written together: a write waits this long for the next event, and at
# most LATEST. Workers are answered without waiting for it.
BURST, LATEST = 0.002, 0.1  # seconds
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass
class _Running:
    trial: optuna.Trial
    recipe: Recipe
    baseline: str
    results: list[EpochResult] = field(default_factory=list)
    stop_reason: str = ""

    @property
    def best(self) -> EpochResult | None:
        """The first of the epochs with the highest validation accuracy."""
        return max(self.results, key=lambda result: result.validation_top1 or 0.0, default=None)


class Supervisor:
    """Runs a study on an executor. The study's lock must be held."""

    def __init__(
        self, study: optuna.Study, storage: WriteThroughStorage, spec: StudySpec,
        executor: Executor, binding: Binding, *, baselines: bool = True, pruning: bool = True,
    ) -> None:  # fmt: skip
        self._study, self._storage, self._spec = study, storage, spec
        self._executor, self._binding, self._pruning = executor, binding, pruning
        self._running: dict[int, _Running] = {}
        self._failures = 0
        trials = study.get_trials(deepcopy=False)
        self._finished = sum(trial.state in FINISHED for trial in trials)
        self._published = {row.name for row in spec.baselines if row.published.has_figures}
        # A failed row is not tried again by itself: the same row would fail the same way.
        seen = {trial.user_attrs.get(BASELINE_ATTR) for trial in trials if not self._cut_short(trial)}
        self._baselines = [row for row in spec.baselines if row.name not in seen] if baselines else []

    def run(self, trials: int, *, seconds: float | None = None) -> Generator[SearchEvent, None, None]:
        """Runs until the study has `trials` finished ones; after `seconds` no new trial begins.

        An event is yielded when what it tells is in the database.

        However it ends, trials still running are marked failed and queued to be run again.
        Raises WorkerBugError for an error in a worker, CaltechHpoError after 3 failures in a row.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        told: list[SearchEvent] = list(self._requeue_orphans())
        try:
            while True:
                told += self._fill(trials, deadline)
                if self._storage.age > LATEST or not self._running or not self._executor.event_within(BURST):
                    self._storage.flush()
                    yield from told  # only what is in the database
                    told = []
                if not self._running:
                    return
                told += self._handle(self._executor.next_event())
        finally:
            for running in self._running.values():
                self._give_back(running.trial.number, running.baseline, "interrupted")
            self._storage.flush()

    def _cut_short(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether a row with published figures lagged: it must run to its end to be compared with them."""
        lagged = str(trial.user_attrs.get("stop_reason", "")).startswith(LAGGING)
        return lagged and trial.user_attrs.get(BASELINE_ATTR) in self._published

    def _requeue_orphans(self) -> Iterator[SearchEvent]:
        """The lock is ours, so every RUNNING trial belongs to a search that is gone."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            baseline = trial.user_attrs.get(BASELINE_ATTR, "")
            self._give_back(trial.number, baseline, "interrupted: its search ended without a word")
            yield Requeued(trial.number)

    def _give_back(self, number: int, baseline: str, reason: str) -> None:
        trial_id = self._trial_id(number)
        trial = self._storage.get_trial(trial_id)
        # A queued trial that died while it was asked for has its parameters in the queue's own record.
        known = trial.system_attrs.get("fixed_params", {}) | trial.params
        params = {name: value for name, value in known.items() if name in self._spec.space}
        others = self._study.get_trials(deepcopy=False)
        repeated = any(other.user_attrs.get(REPEATS_ATTR) == number for other in others)
        # repeated: an earlier attempt to give it back died before it could tell
        if len(params) == len(self._spec.space) and not repeated:
            attributes: dict[str, Any] = {REPEATS_ATTR: number}
            if baseline:
                attributes[BASELINE_ATTR] = baseline
            self._study.enqueue_trial(params, user_attrs=attributes)
        self._storage.set_trial_user_attr(trial_id, "stop_reason", reason)
        self._study.tell(number, state=TrialState.FAIL)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)

    def _fill(self, trials: int, deadline: float | None) -> Iterator[SearchEvent]:
        while (
            self._executor.free
            and self._finished + len(self._running) < trials
            and (deadline is None or time.monotonic() < deadline)
        ):
            yield self._start()

    def _start(self) -> TrialStarted:
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if self._baselines and not waiting:
            # One at a time: trials left waiting would empty the dashboard's parallel coordinates.
            row = self._baselines.pop(0)
            self._study.enqueue_trial(
                complete_params(self._spec, row.params), user_attrs={BASELINE_ATTR: row.name}
            )
        trial = self._study.ask()
        params = suggest(trial, self._spec)
        recipe = recipe_for(self._spec, params, self._binding)
        self._storage.set_trial_system_attr(
            self._trial_id(trial.number), RECIPE_KEY, recipe.model_dump(mode="json")
        )
        trial.set_user_attr("recipe_hash", recipe.hash)
        baseline = trial.user_attrs.get(BASELINE_ATTR, "")
        self._running[trial.number] = _Running(trial, recipe, baseline)
        self._executor.submit(Job(trial.number, recipe))
        return TrialStarted(trial.number, params, recipe.epochs, baseline)

    def _handle(self, event: Event) -> Iterator[SearchEvent]:
        running = self._running[event.job]
        if isinstance(event, EpochDone):
            yield self._epoch(running, event.result)
        elif isinstance(event, Working):
            yield TrialWorking(event.job, event.what, event.done, event.total)
        elif isinstance(event, (Failed, Died)):
            yield self._failed(running, event)
        else:
            yield self._ended(running)

    def _epoch(self, running: _Running, result: EpochResult) -> TrialEpoch:
        number = running.trial.number
        running.results.append(result)
        # By way of pydantic's JSON, which writes NaN as text: bare NaN is no JSON.
        stored = json.loads(result.model_dump_json())
        self._storage.set_trial_system_attr(self._trial_id(number), f"{EPOCH_KEY}{result.epoch}", stored)
        running.stop_reason = divergence(running.results)
        exempt = bool(running.stop_reason) or not self._pruning or running.baseline in self._published
        if lags(running.trial, result, running.recipe.epochs, self._spec.pruner, exempt=exempt):
            running.stop_reason = f"{LAGGING}: {self._spec.pruner.name} pruner at epoch {result.epoch}"
        self._executor.answer(number, not running.stop_reason)
        best = running.best
        return TrialEpoch(number, result, (best.validation_top1 or 0.0) if best else 0.0)

    def _ended(self, running: _Running) -> TrialEnded:
        best = running.best
        assert best is not None, "a training has at least one epoch"
        value = best.validation_top1 or 0.0
        self._describe(running, running.stop_reason or "finished")
        if running.stop_reason:
            running.trial.study.tell(running.trial, state=TrialState.PRUNED)
        else:
            running.trial.study.tell(running.trial, value)
        self._finished += 1
        self._failures = 0
        del self._running[running.trial.number]
        state = "pruned" if running.stop_reason else "complete"
        return TrialEnded(running.trial.number, state, value, running.stop_reason or "finished")

    def _failed(self, running: _Running, event: Failed | Died) -> TrialEnded:
        """Out of memory ends the trial; a dead worker's trial is queued again; a bug ends the search."""
        number = running.trial.number
        del self._running[number]
        self._failures += 1
        if isinstance(event, Died):
            reason = f"worker died (exit code {event.exit_code})"
            self._give_back(number, running.baseline, reason)
        else:
            # An error of ours says what happened in its first line, a traceback in its last.
            reason = (
                f"{event.kind}: {event.message.strip().splitlines()[0 if event.kind == 'refused' else -1]}"
            )
            self._describe(running, reason)
            running.trial.study.tell(running.trial, state=TrialState.FAIL)
            if event.kind == "bug":
                raise WorkerBugError(f"trial {number} failed:\n{event.message}")
            if event.kind == "refused":
                raise CaltechHpoError(f"trial {number} was refused: {event.message}")
        if self._failures >= FAILURES_IN_A_ROW:
            raise CaltechHpoError(
                f"{self._failures} trials in a row failed; the last one: {reason}",
                "for lack of memory use fewer --workers, more --memory, or a smaller crop; then run again",
            )
        return TrialEnded(number, "failed", None, reason)

    def _describe(self, running: _Running, stop_reason: str) -> None:
        """Writes the trial's user attributes, before it is told."""
        trial, results, best = running.trial, running.results, running.best
        ready = self._executor.ready
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
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
