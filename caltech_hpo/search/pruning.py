"""The study's pruner and sampler, and the divergence rule, which is ours."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caltech_hpo.spec import EpochResult, PrunerSpec, StudySpec

if TYPE_CHECKING:
    import optuna

CLIMB = 1.5
CLIMB_EPOCHS = 2
PERCENT = 100
DIVERGED = "diverged"


def divergence(results: Sequence[EpochResult]) -> str:
    """Why a training has diverged after its latest epoch, or "" while it has not.

    Diverged: a loss that is not finite, or a training loss above 1.5 times the first epoch's in
    each of the last two epochs.
    """
    latest, first = results[-1], results[0]
    for name in ("training_loss", "validation_loss"):
        loss = getattr(latest, name)
        if loss is not None and not math.isfinite(loss):
            return f"{DIVERGED}: {name.replace('_', ' ')} is {loss} at epoch {latest.epoch}"
    tail = results[-CLIMB_EPOCHS:]
    limit = CLIMB * first.training_loss
    if len(results) > CLIMB_EPOCHS and all(result.training_loss > limit for result in tail):
        return (
            f"{DIVERGED}: training loss {latest.training_loss:.3g} at epoch {latest.epoch}, "
            f"above {CLIMB} times the first epoch's {first.training_loss:.3g} for {CLIMB_EPOCHS} epochs"
        )
    return ""


def report_steps(epoch: int, epochs: int, compare_at: str) -> range:
    """The Optuna steps at which epoch `epoch` of `epochs` (from 1) reports its accuracy.

    Optuna compares trials at equal steps only. For "epoch" the step is the epoch. For "fraction" it is
    the percent of the trial's own schedule: the epoch reports at each whole percent that it newly
    reaches, so that every complete trial has every step from 1 to 100, however many epochs it ran;
    with more than 100 epochs some reach no new percent, and the range is empty.
    """
    if compare_at == "epoch":
        return range(epoch, epoch + 1)
    return range(PERCENT * (epoch - 1) // epochs + 1, PERCENT * epoch // epochs + 1)


def report(trial: optuna.Trial, result: EpochResult, epochs: int, declared: PrunerSpec) -> None:
    """Reports an epoch of a trial of `epochs` to Optuna, at the steps where trials are compared."""
    for step in report_steps(result.epoch, epochs, declared.compare_at):
        trial.report(result.validation_top1 or 0.0, step)


def lags(trial: optuna.Trial, result: EpochResult, epochs: int, declared: PrunerSpec) -> bool:
    """Whether Optuna's pruner would end the trial of `epochs` epochs after the one that was reported.

    The pruner sees every epoch, but is not asked during the warm-up (counted in epochs, whatever trials
    are compared at) or after the last epoch.
    """
    steps = report_steps(result.epoch, epochs, declared.compare_at)
    return len(steps) > 0 and declared.warmup_epochs <= result.epoch < epochs and trial.should_prune()


def make_pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """Optuna's pruner as the study declares it; with `lags`, none acts before `warmup_epochs`."""
    from optuna import pruners

    from caltech_hpo.search.percentile import RememberingPercentilePruner

    declared = spec.pruner
    longest = max(spec.most_epochs, declared.warmup_epochs)
    # Where steps are percents, `lags` alone keeps the warm-up: epochs differ in percent by schedule.
    warmup, first, last = declared.warmup_epochs, declared.warmup_epochs, longest
    if declared.compare_at == "fraction":
        warmup, first, last = 0, max(1, PERCENT * declared.warmup_epochs // longest), PERCENT
    if declared.name in ("median", "percentile"):
        percentile = declared.percentile if declared.name == "percentile" else 50.0
        return RememberingPercentilePruner(percentile, declared.startup_trials, warmup)
    if declared.name == "hyperband":
        # An explicit maximum: with "auto" Optuna waits for a complete trial to learn it.
        return pruners.HyperbandPruner(
            min_resource=first, max_resource=last, reduction_factor=declared.reduction_factor
        )
    return pruners.NopPruner()


def make_sampler(spec: StudySpec, seed: int, trials_so_far: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler, seeded by `seed` and how many trials the study has.

    The count matters: a sampler that restarts from the same seed would propose its first points again.
    """
    from optuna import samplers

    text = f"{seed}:{trials_so_far}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    declared = spec.sampler
    if declared.name == "tpe":
        return samplers.TPESampler(n_startup_trials=declared.startup_trials, seed=seed)
    if declared.name == "gp":
        return samplers.GPSampler(n_startup_trials=declared.startup_trials, seed=seed)
    if declared.name == "cmaes":
        return samplers.CmaEsSampler(
            n_startup_trials=max(1, declared.startup_trials),
            seed=seed,
            consider_pruned_trials=True,
            warn_independent_sampling=False,
        )
    return samplers.RandomSampler(seed=seed)
