"""The pruner with a memory decides as Optuna's."""

from __future__ import annotations

import math

import optuna
from hypothesis import given
from hypothesis import strategies as st
from optuna.pruners import PercentilePruner

from caltech_hpo.search.percentile import RememberingPercentilePruner

ACCURACY = st.one_of(st.floats(0, 1), st.just(math.nan), st.sampled_from([0.25, 0.5, 0.75]))


@given(
    curves=st.lists(st.lists(ACCURACY, min_size=1, max_size=6), min_size=1, max_size=12),
    percentile=st.floats(1, 99), startup=st.integers(1, 5), warmup=st.integers(0, 3),
    together=st.integers(1, 3),
)  # fmt: skip
def test_it_decides_as_optunas(curves, percentile, startup, warmup, together):
    """`together` trials at a time run side by side, so that they end out of order."""
    study = optuna.create_study(direction="maximize")
    theirs, ours = (
        kind(percentile, startup, warmup) for kind in (PercentilePruner, RememberingPercentilePruner)
    )
    for first in range(0, len(curves), together):
        trials = [(study.ask(), curve) for curve in curves[first : first + together]]
        for step in range(6):
            for trial, curve in reversed(trials):
                if step < len(curve):
                    trial.report(curve[step], step + 1)
                    frozen = study.trials[trial.number]
                    assert ours.prune(study, frozen) == theirs.prune(study, frozen)
                    if step == len(curve) - 1:
                        study.tell(trial, 0.0)
