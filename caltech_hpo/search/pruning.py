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


def reported(results: Sequence[EpochResult], epochs: int, compare_at: str) -> dict[int, float]:
    """The Optuna steps, and the accuracies there, that the latest epoch of a trial of `epochs` adds.

    Optuna compares trials at equal steps only. For "epoch" the step is the epoch. For "fraction" it is
    the percent of the trial's own schedule that its epochs have reached; at the percents between two
    epochs the earlier one's accuracy counts, and before the first epoch's end none, so that no trial is
    compared with what another one reached later. With more than 100 epochs some reach no new percent and
    add nothing: the best of them and of the next epoch that does counts there.
    """
    epoch, accuracies = results[-1].epoch, [result.validation_top1 or 0.0 for result in results]
    if compare_at == "epoch":
        return {epoch: accuracies[-1]}
    before, now = (PERCENT * count // epochs for count in (epoch - 1, epoch))
    if now == before:
        return {}
    if epochs <= PERCENT:
        between = dict.fromkeys(range(before + 1, now), accuracies[-2]) if epoch > 1 else {}
        return between | {now: accuracies[-1]}
    last = -(-before * epochs // PERCENT)  # the epoch that reached the percent before
    return {now: max(accuracies[last:])}


def report(
    trial: optuna.Trial, results: Sequence[EpochResult], epochs: int, declared: PrunerSpec
) -> None:  # fmt: skip
    """Reports the latest epoch of a trial of `epochs` to Optuna, at the steps where trials are compared."""
    for step, accuracy in reported(results, epochs, declared.compare_at).items():
        trial.report(accuracy, step)


def lags(
    trial: optuna.Trial, results: Sequence[EpochResult], epochs: int, declared: PrunerSpec
) -> bool:  # fmt: skip
    """Whether Optuna's pruner would end a trial of `epochs` after its latest one, which was reported.

    The pruner sees every epoch, but is not asked during the warm-up (counted in epochs, whatever trials
    are compared at) or after the last epoch.
    """
    new = bool(reported(results, epochs, declared.compare_at))
    return new and declared.warmup_epochs <= results[-1].epoch < epochs and trial.should_prune()


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
