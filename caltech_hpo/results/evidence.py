"""What is known of a study beyond its trials: scores on the test set, and the confirmation.

The one place through which the page of all studies asks for them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caltech_hpo.results import ledger
from caltech_hpo.results.confirm import confirmed
from caltech_hpo.results.ledger import FinalResult
from caltech_hpo.spec import FitOn, Frozen

if TYPE_CHECKING:
    import optuna

    from caltech_hpo.search.request import Place


class FinalScore(Frozen):
    """The test accuracy of one configuration, 0 to 1, over `seeds` trainings.

    `low` and `high` are a 95% interval: of one training's score over test images (Wilson), of the mean
    over seeds (Student's t) with more of them.
    """

    trial: int
    fit_on: FitOn
    seeds: int
    top1: float
    mean_per_class: float
    low: float
    high: float


class Confirmed(Frozen):
    """The mean validation accuracy, 0 to 1, of a trial's configuration over `seeds` fresh trainings.

    `low` and `high` are the mean's 95% interval, None for a single training.
    """

    trial: int
    seeds: int
    mean: float
    low: float | None
    high: float | None


def final_results(study: optuna.Study, place: Place) -> tuple[FinalResult, ...]:
    """Every use of the test set for a study, in the order of time."""
    return tuple(row.result for row in ledger.scores(place.storage, study.study_name))


def confirmation(study: optuna.Study, place: Place) -> Confirmed | None:
    """The confirmed winner; None while no finalist was trained again."""
    made = confirmed(place.storage, study.study_name)
    if made is None:
        return None
    low, high = made.winner.ci95 or (None, None)
    return Confirmed(
        trial=made.winner.trial, seeds=len(made.seeds), mean=made.winner.mean, low=low, high=high
    )


def by_configuration(results: Sequence[FinalResult]) -> tuple[FinalScore, ...]:
    """The results by configuration, several seeds as one, in the order of their first."""
    groups: dict[tuple[int, FitOn], list[FinalResult]] = {}
    for result in results:
        groups.setdefault((result.trial, result.fit_on), []).append(result)
    return tuple(_over_seeds(group) for group in groups.values())


def _over_seeds(group: Sequence[FinalResult]) -> FinalScore:
    scores = [result.test_accuracy for result in group]
    mean, (low, high) = statistics.fmean(scores), group[0].ci95
    if len(group) > 1:
        from scipy import stats

        half = float(stats.t.ppf(0.975, len(group) - 1)) * statistics.stdev(scores) / math.sqrt(len(group))
        low, high = mean - half, mean + half
    return FinalScore(
        trial=group[0].trial, fit_on=group[0].fit_on, seeds=len(group), top1=mean,
        mean_per_class=statistics.fmean(result.test_mean_per_class_accuracy for result in group),
        low=low, high=high,
    )  # fmt: skip
