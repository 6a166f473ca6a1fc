"""Which hyperparameters mattered: Optuna's importances, with the pruned trials counted."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from caltech_hpo.ranges import Choices, Dimension, IntRange
from caltech_hpo.search.records import TrialRecord
from caltech_hpo.spec import Frozen, StudySpec

if TYPE_CHECKING:
    import optuna

FEWEST = 2  # trials; with one there is nothing to compare
SCORED = ("complete", "pruned")


class Importance(Frozen):
    """How much of the difference between good and other trials each searched field explains.

    `shares` are 0 to 1 and sum to 1, largest first; None when there is nothing to compute, and
    `reason` then says why. They rest on `complete` + `pruned` trials.
    """

    shares: dict[str, float] | None
    complete: int
    pruned: int
    reason: str = ""


def scored_records(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete and pruned trials with a value; failed ones teach nothing, running ones have no end."""
    return [
        record for record in records
        if record.state in SCORED and record.value is not None and math.isfinite(record.value)
    ]  # fmt: skip


def study_of(spec: StudySpec, records: Sequence[TrialRecord], name: str = "") -> optuna.Study:
    """An Optuna study in memory, in which each of the records is complete with its best accuracy so far.

    Optuna's importances and plots read complete trials only. Left with those that survived a pruner,
    they would be told nothing about the values that a pruner cut off. Trials keep their numbers:
    those that are not among the records are failed ones without parameters.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(study_name=name or spec.name, direction="maximize")
    space, given = distributions(spec, records), {record.number: record for record in records}
    for number in range(max(given, default=-1) + 1):
        record = given.get(number)
        if record is None:
            study.add_trial(create_trial(state=TrialState.FAIL))
            continue
        params = {key: value for key, value in record.params.items() if key in space}
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=record.value,
                params=params,
                distributions={key: space[key] for key in params},
            )
        )
    return study


def distributions(spec: StudySpec, records: Sequence[TrialRecord]) -> dict[str, Any]:
    """Optuna's distributions of the space, stretched to queued values that lie outside it."""
    return {
        name: _distribution(
            dimension, [record.params[name] for record in records if name in record.params]
        )
        for name, dimension in spec.space.items()
    }  # fmt: skip


def _distribution(dimension: Dimension, seen: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choices):
        return CategoricalDistribution(tuple(dict.fromkeys([*dimension.choices, *seen])))
    low, high = min([dimension.low, *seen]), max([dimension.high, *seen])
    if isinstance(dimension, IntRange):
        on_grid = all((value - dimension.low) % dimension.step == 0 for value in seen)
        return IntDistribution(int(low), int(high), step=dimension.step if on_grid else 1)
    return FloatDistribution(low, high, log=dimension.log and low > 0)


def importances(spec: StudySpec, records: Sequence[TrialRecord]) -> Importance:
    """Optuna's default importances (PED-ANOVA) over complete and pruned trials."""
    scored = scored_records(records)
    counts = {state: sum(record.state == state for record in scored) for state in SCORED}

    def none(reason: str) -> Importance:
        return Importance(shares=None, reason=reason, **counts)

    if len(scored) < FEWEST:
        return none(
            f"needs {FEWEST} finished trials, there {'is' if len(scored) == 1 else 'are'} {len(scored)}"
        )
    if all(distribution.single() for distribution in distributions(spec, scored).values()):
        return none("the space has one value only")
    if len({record.value for record in scored}) == 1:
        return none("all trials scored the same")
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that few trials make it inexact: the counts say so
        shares = optuna.importance.get_param_importances(study_of(spec, scored))
    if not shares or not all(math.isfinite(share) for share in shares.values()):
        return none("the trials do not tell the fields apart")
    return Importance(shares=dict(sorted(shares.items(), key=lambda item: -item[1])), **counts)
