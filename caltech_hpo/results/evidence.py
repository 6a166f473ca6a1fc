"""What is known of a study beyond its trials: scores on the test set, and the confirmation.

The one place through which the page of all studies asks for them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caltech_hpo.results import ledger
from caltech_hpo.results.confirm import confirmed
from caltech_hpo.results.ledger import FinalResult, ScoreRow
from caltech_hpo.results.plan import final_recipe
from caltech_hpo.results.scores import mean_accuracy
from caltech_hpo.spec import Frozen
from caltech_hpo.terms import FitOn

if TYPE_CHECKING:
    import optuna

    from caltech_hpo.search.records import TrialRecord
    from caltech_hpo.search.request import Place


class FinalScore(Frozen):
    """The test accuracy of one configuration, 0 to 1, over `seeds` trainings.

    `low` and `high` are a 95% interval: of one training's score over test images (Wilson), of the mean
    over seeds (Student's t) with more of them. `leaks` counts test images that are training or validation
    images too.
    """

    trial: int
    configuration: str
    fit_on: FitOn
    seeds: int
    top1: float
    mean_per_class: float
    low: float
    high: float
    leaks: int = 0

    @property
    def leak_words(self) -> str:
        """What follows the score where there are leaks."""
        return f", {self.leaks} of the images are training or validation images too" if self.leaks else ""


class Confirmed(Frozen):
    """The mean validation accuracy, 0 to 1, of a trial's configuration over `seeds` fresh trainings.

    `low` and `high` are the mean's 95% interval, None for a single training.
    """

    trial: int
    configuration: str
    seeds: int
    mean: float
    low: float | None
    high: float | None


def test_scores(study: optuna.Study, place: Place) -> tuple[ScoreRow, ...]:
    """Every use of the test set for a study, in the order of time."""
    return tuple(ledger.scores(place.storage, study.study_name))


def test_uses(study: optuna.Study, place: Place) -> int:
    """How often the test set was used for the study and its NAME@K."""
    return len(ledger.family_scores(place.storage, study.study_name))


def test_reasons(study: optuna.Study, place: Place) -> tuple[str, ...]:
    """Why the test set was used again, for the study and its NAME@K."""
    rows = ledger.family_scores(place.storage, study.study_name)
    return tuple(dict.fromkeys(row.reason for row in rows if row.reason))


def known_configurations(records: Sequence[TrialRecord]) -> set[str]:
    """What the trials are or become when `final` fits them on the validation images too."""
    found = set()
    for record in records:
        if record.recipe is not None:
            found.add(record.recipe.configuration)
            if record.best_epoch is not None:
                found.add(final_recipe(record, "train+val").configuration)
    return found


def of_trials(rows: Sequence[ScoreRow], records: Sequence[TrialRecord]) -> list[ScoreRow]:
    """The scores of configurations that are among the trials.

    Others are of a study that was deleted: they still say how often the test set was used, and nothing of
    the study that now has its name.
    """
    by_number = {record.number: record for record in records}
    return [
        row for row in rows
        if row.trial in by_number and row.configuration in known_configurations([by_number[row.trial]])
    ]  # fmt: skip


def confirmation(study: optuna.Study, records: Sequence[TrialRecord], place: Place) -> Confirmed | None:
    """The confirmed winner; None while no finalist of this study was trained again."""
    made = confirmed(place.storage, study.study_name)
    if made is None:
        return None
    winner = next((record for record in records if record.number == made.winner.trial), None)
    if winner is None or not winner.recipe or winner.recipe.configuration != made.winner.configuration:
        return None  # of a study that was deleted
    low, high = made.winner.ci95 or (None, None)
    return Confirmed(
        trial=made.winner.trial, configuration=made.winner.configuration, seeds=len(made.seeds),
        mean=made.winner.mean, low=low, high=high,
    )  # fmt: skip


def by_configuration(rows: Sequence[ScoreRow]) -> tuple[FinalScore, ...]:
    """The scores by configuration, several seeds as one, in the order of their first."""
    groups: dict[str, list[FinalResult]] = {}
    for row in rows:
        groups.setdefault(row.configuration, []).append(row.result)
    return tuple(_over_seeds(configuration, group) for configuration, group in groups.items())


def _over_seeds(configuration: str, group: Sequence[FinalResult]) -> FinalScore:
    accuracy = mean_accuracy([result.test_accuracy for result in group])
    low, high = accuracy.ci95 or group[0].ci95
    return FinalScore(
        trial=group[0].trial, configuration=configuration, fit_on=group[0].fit_on, seeds=len(group),
        top1=accuracy.mean,
        mean_per_class=statistics.fmean(result.test_mean_per_class_accuracy for result in group),
        low=low, high=high, leaks=max(result.leaks for result in group),
    )  # fmt: skip
