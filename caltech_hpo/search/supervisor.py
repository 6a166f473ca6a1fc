"""The one process that owns a study: ask, dispatch, report, prune, tell. One loop over events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import optuna
from optuna.trial import TrialState

from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.search.events import (
    Requeued,
    SearchEvent,
    TrialEnded,
    TrialEpoch,
    TrialPaused,
    TrialResumed,
    TrialStarted,
)
from caltech_hpo.search.executors import Executor
from caltech_hpo.search.messages import Died, EpochDone, Event, Failed, Midway, Paused, WorkerBugError
from caltech_hpo.search.pruning import report
from caltech_hpo.search.records import BASELINE_ATTR, EPOCH_KEY, RECIPE_KEY, trial_record
from caltech_hpo.search.request import never
from caltech_hpo.search.rows import HandTunedRows
from caltech_hpo.search.running import (
    MOST_DEATHS,
    HungWatch,
    Running,
    give_back,
    progress_of,
    slowest_epoch,
    tell,
    verdict,
    written,
)
from caltech_hpo.search.space import Binding, recipe_for, suggest
from caltech_hpo.search.trial_files import NONE_BETTER, TrialFiles
from caltech_hpo.search.write_through import WriteThroughStorage
from caltech_hpo.spec import EpochResult, StudySpec

FAILURES_IN_A_ROW = 3
# Epochs that come in a burst are written together: a write waits this long for the next event, and at
# most LATEST. Workers are answered without waiting for it.
BURST, LATEST = 0.002, 0.1  # seconds
LOOK_EVERY = 0.2  # seconds between looks at whether to stop
PATIENCE = 45.0  # seconds that running trials have to pause: a batch, and a gigabyte to be written
DEATHS_KEY = "caltech_hpo:worker_deaths"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Supervisor:
    """Runs a study on an executor. The study's lock must be held."""

    def __init__(
        self, study: optuna.Study, storage: WriteThroughStorage, spec: StudySpec,
        executor: Executor, binding: Binding, *, baselines: bool = True, pruning: bool = True,
        checkpoints: Path | None = None, models: Path | None = None, trial_seconds: float | None = None,
    ) -> None:  # fmt: skip
        """`checkpoints` is the folder of running trials' (None: none), `models` for the best trial's weights.
        A trial ends with its first epoch after `trial_seconds`."""
        self._study, self._storage, self._spec, self._trial_seconds = study, storage, spec, trial_seconds
        self._executor, self._binding, self._pruning = executor, binding, pruning
        self._running: dict[int, Running] = {}
        self._watch = HungWatch(executor)
        self._orphans: list[int] = []
        self._failures = 0
        trials = study.get_trials(deepcopy=False)
        self._slowest = slowest_epoch(trials)
        self._finished = sum(trial.state in FINISHED for trial in trials)
        self._rows = HandTunedRows(spec, trials, wanted=baselines)
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        best = max(((trial.value or 0.0, -trial.number) for trial in complete), default=NONE_BETTER)
        self._files = TrialFiles(study.study_name, checkpoints, models, best)
        storage.forget_epochs()

    def run(
        self, trials: int, *, seconds: float | None = None, stop: Callable[[], bool] = never
    ) -> Generator[SearchEvent, None, None]:
        """Runs until the study has `trials` finished ones; after `seconds` no new trial begins.

        An event is yielded when what it tells is in the database. Once `stop` says True the running trials
        are paused; however the search ends, the next one goes on with them.
        Raises WorkerBugError for an error in a worker, CaltechHpoError after 3 failures in a row.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        told: list[SearchEvent] = list(self._find_orphans())
        paused_at: float | None = None
        try:
            while True:
                if paused_at is None and stop():
                    paused_at = time.monotonic()
                    self._executor.pause()
                if paused_at is None:
                    told += self._fill(trials, deadline)
                if self._storage.age > LATEST or not self._running or not self._executor.event_within(BURST):
                    yield from written(self._storage, stop)
                    self._files.settle()
                    yield from told  # only what is in the database
                    told = []
                # Nothing runs and no worker is free: all of a cluster's machines are being replaced.
                left = self._running or not (paused_at or self._executor.free)
                if not left or (paused_at and time.monotonic() - paused_at > PATIENCE):
                    yield from (TrialPaused(number, saved=False) for number in self._running)
                    return
                if event := self._executor.next_event(LOOK_EVERY):
                    told += self._handle(event)
                self._watch.look(self._running, self._slowest)
        finally:
            self._storage.flush()
            self._files.settle()

    def _find_orphans(self) -> Iterator[SearchEvent]:
        """The lock is ours, so every RUNNING trial belongs to a search that is gone. It goes on.

        One that was killed before its recipe was written, or whose images were of another size, begins anew.
        """
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.system_attrs.get(RECIPE_KEY, {}).get("resize") == self._spec.recipe.resize:
                self._orphans.append(trial.number)
            else:
                baseline = trial.user_attrs.get(BASELINE_ATTR, "")
                give_back(self._study, self._spec, trial, baseline)
                yield Requeued(trial.number)
        self._files.tidy(set(self._orphans))

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)

    def _fill(self, trials: int, deadline: float | None) -> Iterator[SearchEvent]:
        while (
            self._executor.free
            and self._finished + len(self._running) < trials
            and (deadline is None or time.monotonic() < deadline)
        ):
            if self._orphans:
                yield from self._resume(self._orphans.pop(0))
            else:
                yield self._start()

    def _resume(self, number: int) -> Iterator[SearchEvent]:
        """Goes on with a trial from what the database and its checkpoint hold of it."""
        record = trial_record(self._study.get_trials(deepcopy=False)[number])
        assert record.recipe is not None, "an orphan has its recipe"
        trial = optuna.Trial(self._study, self._trial_id(number))
        running = Running(trial, record.recipe, record.baseline, list(record.epochs))
        self._running[number] = running
        yield TrialResumed(number, record.params, record.recipe.epochs, len(record.epochs), record.baseline)
        if record.epochs:
            running.stop_reason = self._verdict(running)
        done = len(record.epochs) == record.recipe.epochs and not self._files.lack_weights(running)
        if running.stop_reason or done:
            yield self._ended(running)
        else:
            self._executor.submit(self._files.job(running))

    def _start(self) -> TrialStarted:
        self._rows.queue_next(self._study)
        trial = self._study.ask()
        params = suggest(trial, self._spec)
        recipe = recipe_for(self._spec, params, self._binding)
        self._storage.set_trial_system_attr(
            self._trial_id(trial.number), RECIPE_KEY, recipe.model_dump(mode="json")
        )
        trial.set_user_attr("recipe_hash", recipe.hash)
        trial.set_user_attr("device", self._executor.ready.device)  # the one that its epochs' times tell of
        running = Running(trial, recipe, trial.user_attrs.get(BASELINE_ATTR, ""))
        self._running[trial.number] = running
        self._executor.submit(self._files.job(running))
        return TrialStarted(trial.number, params, recipe.epochs, running.baseline)

    def _handle(self, event: Event) -> Iterator[SearchEvent]:
        running = self._running[event.job]
        running.heard = time.monotonic()
        if isinstance(event, EpochDone):
            yield self._epoch(running, event.result)
        elif isinstance(event, Midway):
            yield progress_of(event)
        elif isinstance(event, Died):
            yield self._died(running, event)
        elif isinstance(event, Failed):
            yield self._failed(running, event)
        elif isinstance(event, Paused):
            del self._running[event.job]
            self._orphans.append(event.job)  # where only its worker was asked to end, it goes on
            yield TrialPaused(event.job)
        else:
            yield self._ended(running)

    def _epoch(self, running: Running, result: EpochResult) -> TrialEpoch:
        number = running.trial.number
        running.results.append(result)
        self._slowest = max(self._slowest, result.seconds)
        # By way of pydantic's JSON, which writes NaN as text: bare NaN is no JSON.
        stored = json.loads(result.model_dump_json())
        self._storage.set_trial_system_attr(self._trial_id(number), f"{EPOCH_KEY}{result.epoch}", stored)
        report(running.trial, running.results, running.recipe.epochs, self._spec.pruner)
        running.stop_reason = self._verdict(running)
        self._executor.answer(number, not running.stop_reason)
        best = running.best
        return TrialEpoch(number, result, (best.validation_top1 or 0.0) if best else 0.0)

    def _verdict(self, running: Running) -> str:
        exempt = not self._pruning or running.baseline in self._rows.published
        return verdict(running, self._spec.pruner, exempt=exempt, seconds=self._trial_seconds)

    def _ended(self, running: Running) -> TrialEnded:
        state = TrialState.PRUNED if running.stop_reason else TrialState.COMPLETE
        ended = tell(running, self._executor.ready, state, running.stop_reason or "finished")
        self._finished += 1
        self._failures = 0
        self._forget(ended.number, ended.value if state == TrialState.COMPLETE else None)
        return ended

    def _died(self, running: Running, event: Died) -> SearchEvent:
        """The same trial goes on in another worker, unless it was to end anyway or has cost three."""
        if running.stop_reason:
            return self._ended(running)
        number = running.trial.number
        attributes = self._storage.get_trial(self._trial_id(number)).system_attrs
        deaths = attributes.get(DEATHS_KEY, 0) + 1
        self._storage.set_trial_system_attr(self._trial_id(number), DEATHS_KEY, deaths)
        if deaths >= MOST_DEATHS:
            return self._give_up(
                running, f"its worker died {deaths} times (last exit code {event.exit_code})"
            )
        self._files.tidy({*self._running, *self._orphans})
        if not self._executor.free:  # a lost machine's place is filled later: the next free worker takes it
            del self._running[number]
            self._orphans.insert(0, number)
            return TrialPaused(number)
        self._executor.submit(self._files.job(running))
        done = len(running.results)
        return TrialResumed(number, running.trial.params, running.recipe.epochs, done, running.baseline, True)

    def _failed(self, running: Running, event: Failed) -> SearchEvent:
        """Out of memory ends the trial; a bug or a refusal ends the search."""
        ended = self._give_up(running, event.reason, last=event.kind != "out of memory")
        if event.kind == "bug":
            raise WorkerBugError(f"trial {running.trial.number} failed:\n{event.message}")
        if event.kind == "refused":
            raise CaltechHpoError(f"trial {running.trial.number} was refused: {event.message}")
        return ended

    def _give_up(self, running: Running, reason: str, *, last: bool = False) -> SearchEvent:
        """Ends a trial as failed. Raises CaltechHpoError after three in a row, unless it is the `last`."""
        ended = tell(running, self._executor.ready, TrialState.FAIL, reason)
        self._failures += 1
        self._forget(ended.number)
        if self._failures >= FAILURES_IN_A_ROW and not last:
            raise CaltechHpoError(
                f"{self._failures} trials in a row failed; the last one: {reason}",
                "for lack of memory use fewer --workers, more --memory, or a smaller crop; then run again",
            )
        return ended

    def _forget(self, number: int, value: float | None = None) -> None:
        """A trial has ended: its files are put away once that is in the database."""
        del self._running[number]
        self._files.ended(number, value)
