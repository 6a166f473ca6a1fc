"""How long a study will take: steps timed here, times what the space draws, less what is pruned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from caltech_hpo.search.costs import Costs
from caltech_hpo.search.events import (
    SearchEvent,
    TrialEnded,
    TrialEpoch,
    TrialResumed,
    TrialStarted,
    TrialUnderway,
)
from caltech_hpo.search.records import TrialRecord, lacked_memory
from caltech_hpo.search.space import suggest
from caltech_hpo.spec import Hyperparameters, StudySpec
from caltech_hpo.timings import Kind, kind_of

DRAWN = 200  # parameter sets that stand for what the sampler will propose
SIMULATED = 400  # studies
# What pruning does where a study has no history: a Beta distribution, whose middle half lies between 0.46 and
# 0.76. Of what could be pruned, the median pruner ended 27 of 34, 25 of 40 and (by replay) 20 of 40 trials of
# three long searches.
ASSUMED_PRUNED, ASSUMED_KEPT = 3, 2
# Pruned at once, or after up to this share of what is left behind the warm-up.
ASSUMED_DELAY = 0.3
# Standard deviation of the log: steps timed once are not the steps of an hour. Half of what they differ by
# among themselves is added.
TIMING_ERROR = 0.08


@dataclass(frozen=True)
class Forecast:
    """Seconds until the study has its trials: the median of simulated studies, and the middle 80% of them.

    `epochs` of a trial that has not begun (of one that was left: the rest) and the share `pruned` are
    expected; `history` trials have taught it.
    """

    seconds: float
    low: float
    high: float
    trials: int
    epochs: float
    pruned: float
    history: int

    def later(self, seconds: float) -> Forecast:
        """The same, beginning in so many seconds."""
        return replace(self, seconds=self.seconds + seconds, low=self.low + seconds, high=self.high + seconds)


@dataclass
class _Trial:
    """One that runs or will run; `number` is None as long as it has none of its own.

    `done` of its epochs are over, and `part` of the next one, 0 to 1.
    """

    values: Hyperparameters
    params: dict[str, Any]
    number: int | None = None
    done: int = 0
    part: float = 0.0
    baseline: str = ""

    @property
    def kind(self) -> Kind:
        return kind_of(self.values)

    @property
    def left(self) -> float:
        """Epochs, and what is left of the one that runs."""
        return max(0.0, self.values.epochs - self.done - self.part)


class Forecaster:
    """Foretells a study, and learns from each event of its search.

    Trials that were left come first, then those that wait, then hand-tuned rows, with their own parameters.
    """

    def __init__(
        self, spec: StudySpec, records: Sequence[TrialRecord], costs: Costs, *, pruning: bool = True,
        baselines: bool = True, parallel: int = 1, device: str = "",
    ) -> None:  # fmt: skip
        """`records` are the trials so far; `parallel` trainings run at once, each as `costs` says.

        What epochs took on another device than `device` says nothing (empty: on any).
        """
        # What is seen is added to a copy: others may go on from the same costs.
        self._costs = replace(costs, seen={kind: list(found) for kind, found in costs.seen.items()})
        self._spec, self._parallel, self._device = spec, parallel, device
        self._pruning = pruning and spec.pruner.name != "none"
        self._running: dict[int, _Trial] = {}
        self._ends: list[tuple[bool, float]] = []  # of each finished trial: pruned?, share of its epochs run
        self._finished = 0
        for record in records:
            self._learn(record)
        tried = {record.baseline for record in records if not lacked_memory(record.stop_reason)}
        rows = [row.params for row in spec.baselines if row.name not in tried] if baselines else []
        waiting = [record for state in ("running", "waiting") for record in records if record.state == state]
        self._queued = [self._left(record) for record in waiting]
        self._queued += [self._trial(params) for params in rows]
        self._params = draw(spec, DRAWN)
        self._drawn = [self._values(params) for params in self._params]
        self._kinds = [kind_of(values) for values in self._drawn]

    def _values(self, params: dict[str, Any]) -> Hyperparameters:
        return self._spec.recipe.model_copy(update=params)

    def _trial(self, params: dict[str, Any]) -> _Trial:
        return _Trial(self._values(params), params)

    def _left(self, record: TrialRecord) -> _Trial:
        if record.state == "running" and record.recipe is None:  # it is queued again, under another number
            return self._trial(record.params)
        values = record.recipe or self._values(record.params)
        return _Trial(values, record.params, record.number, len(record.epochs))

    def _learn(self, record: TrialRecord) -> None:
        finished = record.state in ("complete", "pruned")
        self._finished += finished
        if record.recipe is None or not record.epochs:
            return
        if not self._device or record.device in ("", self._device):
            seen = self._costs.seen.setdefault(kind_of(record.recipe), [])
            seen.extend(result.seconds for result in record.epochs)
        if finished and not record.baseline:
            self._ends.append((record.state == "pruned", len(record.epochs) / record.recipe.epochs))

    def handle(self, event: SearchEvent) -> None:
        """Takes in one event of the search."""
        if isinstance(event, (TrialStarted, TrialResumed)):
            trial = self._running.get(event.number) or self._next(event.number, event.params)
            trial.done = event.done if isinstance(event, TrialResumed) else 0
            trial.baseline = event.baseline
            self._running[event.number] = trial
        elif isinstance(event, TrialEpoch):
            trial = self._running[event.number]
            trial.done, trial.part = event.result.epoch, 0.0
            self._costs.seen.setdefault(trial.kind, []).append(event.result.seconds)
        elif isinstance(event, TrialUnderway):
            self._running[event.number].part = event.part.images / event.part.total
        elif isinstance(event, TrialEnded):
            trial = self._running.pop(event.number)
            if event.state in ("complete", "pruned"):
                self._finished += 1
                if not trial.baseline:  # as in `_learn`: hand-tuned rows say little of the others
                    self._ends.append((event.state == "pruned", trial.done / trial.values.epochs))

    def _next(self, number: int, params: dict[str, Any]) -> _Trial:
        """The trial that begins, taken out of the queue if it is there."""
        begun = self._trial(params)
        for trial in self._queued:
            if trial.number == number or (trial.number is None and trial.values == begun.values):
                self._queued.remove(trial)
                return trial
        return begun

    def examples(self) -> list[dict[str, Any]]:
        """Parameters of one training of each kind to be expected, the most frequent kind first."""
        counted: Counter[Kind] = Counter()
        found: dict[Kind, dict[str, Any]] = {}
        for params in (*(trial.params for trial in self._queued), *self._params):
            kind = kind_of(self._values(params))
            counted[kind] += 1
            found.setdefault(kind, params)
        return [found[kind] for kind, _ in counted.most_common()]

    def unseen(self) -> list[dict[str, Any]]:
        """The examples whose epochs no training so far tells the cost of."""
        return [
            params
            for params in self.examples()
            if not any(kind_of(self._values(params)).is_like(seen) for seen in self._costs.seen)
        ]

    def forecast(self, trials: int) -> Forecast | None:
        """Until the study has `trials` finished ones; None where nothing was timed or seen."""
        if not self._costs.known:
            return None
        left = max(0, trials - self._finished - len(self._running))
        queued, random = self._queued[:left], np.random.default_rng(0)
        drawn = left - len(queued)
        fixed = sum(self._costs.setup(trial.kind) for trial in queued)
        fixed += sum(
            trial.left * self._costs.epoch(trial.kind) for trial in (*queued, *self._running.values())
        )
        new = set(self._kinds if drawn else []) | {trial.kind for trial in queued}
        fixed += self._costs.once(new)
        setup, epoch_seconds = self._columns()
        lengths = np.array([values.epochs for values in self._drawn])
        chosen = random.integers(len(lengths), size=(SIMULATED, drawn))
        before = self._finished + len(self._running) + len(queued)
        pruned, shares = self._simulated_pruning(random, before, lengths[chosen])
        epochs = np.maximum(1, np.round(shares * lengths[chosen]))
        seconds = (setup[chosen] + epochs * epoch_seconds[chosen]).sum(1) + fixed
        error = math.hypot(TIMING_ERROR, math.log(self._costs.spread) / 2)
        seconds *= np.exp(random.normal(0, error, SIMULATED)) / self._parallel
        low, middle, high = np.quantile(seconds, [0.1, 0.5, 0.9])
        each = [*(trial.left for trial in queued), *epochs.mean(0)]
        return Forecast(
            float(middle), float(low), float(high), left, float(np.mean(each)) if left else 0.0,
            float(pruned.mean(0).sum()) / left if left else 0.0, len(self._ends),
        )  # fmt: skip

    def _columns(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        known = {kind: (self._costs.setup(kind), self._costs.epoch(kind)) for kind in set(self._kinds)}
        setup, epoch = zip(*(known[kind] for kind in self._kinds), strict=True)
        return np.array(setup), np.array(epoch)

    def _simulated_pruning(
        self, random: np.random.Generator, before: int, lengths: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Which trials are pruned, and the share of its epochs that each runs; (SIMULATED, drawn) both.

        `before` trials of the study come before them.
        """
        if not self._pruning:
            return np.zeros(lengths.shape, bool), np.ones(lengths.shape)
        early = [share for was_pruned, share in self._ends if was_pruned]
        kept = len(self._ends) - len(early)
        if self._ends:
            chance = random.beta(1 + len(early), 1 + kept, (SIMULATED, 1))
        else:
            chance = random.beta(ASSUMED_PRUNED, ASSUMED_KEPT, (SIMULATED, 1))
        pruned = random.random(lengths.shape) < chance
        pruned[:, : max(0, self._spec.pruner.startup_trials - before)] = False
        warmup = np.minimum(1.0, self._spec.pruner.warmup_epochs / lengths)
        stops = warmup + ASSUMED_DELAY * (1 - warmup) * random.random(lengths.shape)
        if early:
            stops = random.choice(np.array(early), size=lengths.shape)
        return pruned, np.where(pruned, stops, 1.0)


def draw(spec: StudySpec, count: int) -> list[dict[str, Any]]:
    """Parameter sets from all over the space."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [suggest(study.ask(), spec) for _ in range(count)]
