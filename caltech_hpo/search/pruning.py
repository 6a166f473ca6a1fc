"""The study's pruner and sampler, and the divergence rule, which is ours."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caltech_hpo.spec import EpochResult, StudySpec

if TYPE_CHECKING:
    import optuna

CLIMB = 1.5
CLIMB_EPOCHS = 2


def divergence(results: Sequence[EpochResult]) -> str:
    """Why a training has diverged after its latest epoch, or "" while it has not.

    Diverged: a loss that is not finite, or a training loss above 1.5 times the first epoch's in
    each of the last two epochs.
    """
    latest, first = results[-1], results[0]
    for name in ("training_loss", "validation_loss"):
        loss = getattr(latest, name)
        if loss is not None and not math.isfinite(loss):
            return f"diverged: {name.replace('_', ' ')} is {loss} at epoch {latest.epoch}"
    tail = results[-CLIMB_EPOCHS:]
    limit = CLIMB * first.training_loss
    if len(results) > CLIMB_EPOCHS and all(result.training_loss > limit for result in tail):
        return (
            f"diverged: training loss {latest.training_loss:.3g} at epoch {latest.epoch}, "
            f"above {CLIMB} times the first epoch's {first.training_loss:.3g} for {CLIMB_EPOCHS} epochs"
        )
    return ""


def make_pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """Optuna's pruner as the study declares it; none acts before `warmup_epochs`."""
    from optuna import pruners

    declared = spec.pruner
    if declared.name == "median":
        return pruners.MedianPruner(declared.startup_trials, declared.warmup_epochs)
    if declared.name == "percentile":
        return pruners.PercentilePruner(declared.percentile, declared.startup_trials, declared.warmup_epochs)
    if declared.name == "hyperband":
        # An explicit maximum: with "auto" Optuna waits for a complete trial to learn it.
        return pruners.HyperbandPruner(
            min_resource=declared.warmup_epochs,
            max_resource=max(spec.most_epochs, declared.warmup_epochs),
            reduction_factor=declared.reduction_factor,
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
