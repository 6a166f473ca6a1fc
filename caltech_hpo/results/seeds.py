"""One configuration over several seeds: the mean of its test scores, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caltech_hpo.results.ledger import FinalResult
from caltech_hpo.results.scores import mean_accuracy, mean_interval
from caltech_hpo.spec import Frozen
from caltech_hpo.terms import FitOn


class SeedsResult(Frozen):
    """Test scores of one configuration over seeds. Accuracies are 0 to 1.

    `test_accuracy` is the mean over `seeds` trainings, `test_accuracy_sd` their standard deviation,
    `ci95` the t interval of the mean: it covers other seeds, not other test images.
    """

    study: str
    trial: int
    params: dict[str, Any]
    fit_on: FitOn
    seeds: int
    test_accuracy: float
    test_accuracy_sd: float
    ci95: tuple[float, float]
    test_mean_per_class_accuracy: float
    results: tuple[FinalResult, ...]


def over_seeds(results: Sequence[FinalResult]) -> SeedsResult:
    """The scores of at least two seeds as one. Raises ValueError for fewer."""
    accuracy = mean_accuracy([result.test_accuracy for result in results])
    if accuracy.sd is None or accuracy.ci95 is None:
        raise ValueError("one seed has no interval")
    first = results[0]
    return SeedsResult(
        study=first.study, trial=first.trial, params=first.params, fit_on=first.fit_on, seeds=len(results),
        test_accuracy=accuracy.mean, test_accuracy_sd=accuracy.sd, ci95=accuracy.ci95,
        test_mean_per_class_accuracy=mean_interval(
            [result.test_mean_per_class_accuracy for result in results]
        ).mean,
        results=tuple(results),
    )  # fmt: skip
