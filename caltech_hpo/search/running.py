"""A trial that runs: what is known of it, when it is to end, what is written about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from caltech_hpo.search.messages import Ready
from caltech_hpo.search.pruning import divergence, lags
from caltech_hpo.search.records import BASELINE_ATTR
from caltech_hpo.spec import EpochResult, PrunerSpec, Recipe, StudySpec

REPEATS_ATTR = "repeats_trial"
LAGGING = "lagging"
MOST_DEATHS = 3  # of workers that one training may cost
UNBEGUN = "interrupted: its search ended before it began"


@dataclass
class Running:
    """A trial, its recipe, the hand-tuned row it repeats (or ""), its epochs so far."""

    trial: optuna.Trial
    recipe: Recipe
    baseline: str
    results: list[EpochResult] = field(default_factory=list)
    stop_reason: str = ""

    @property
    def best(self) -> EpochResult | None:
        """The first of the epochs with the highest validation accuracy."""
        return max(self.results, key=lambda result: result.validation_top1 or 0.0, default=None)


def verdict(running: Running, pruner: PrunerSpec, *, exempt: bool) -> str:
    """Why the trial is to end after its latest epoch, which was reported, or ""; lagging unless `exempt`."""
    latest = running.results[-1]
    diverged = divergence(running.results)
    if diverged or exempt:
        return diverged
    if lags(running.trial, latest, running.recipe.epochs, pruner):
        return f"{LAGGING}: {pruner.name} pruner at epoch {latest.epoch}"
    return ""


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
