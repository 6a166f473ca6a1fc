"""All studies at once: what was published, our run of the same row, our best, and what it rests on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from pydantic import ValidationError

from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.results.analysis import Importance, importances
from caltech_hpo.results.evidence import (
    Confirmed,
    FinalScore,
    by_configuration,
    confirmation,
    known_configurations,
    test_reasons,
    test_scores,
    test_uses,
)
from caltech_hpo.results.report import NOT_RUN, ReportRow, report_rows
from caltech_hpo.search.changes import SPEC_ATTR, study_spec
from caltech_hpo.search.records import TrialRecord, best_record, trial_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import find_study, open_existing, study_names
from caltech_hpo.spec import Baseline, Frozen, Published, StudySpec
from caltech_hpo.study_files import base_name, load_study, study_files

if TYPE_CHECKING:
    import optuna


class StudySummary(Frozen):
    """One study on one line. Accuracies are 0 to 1; None and "not run" where nothing was run.

    `row` names the hand-tuned row with the best published accuracy ("" without hand-tuned rows), and
    `ours_*` is our latest run of that same row. `test` is the score of the best trial, or else the
    last one taken; `test_uses` counts every scoring on the test set, `test_reasons` say why it was used
    again. `seeds` are those of the search's
    trainings.
    """

    study: str
    in_database: bool
    row: str
    published: Published | None
    ours_trial: int | None
    ours_state: str
    ours_validation: float | None
    ours_test: float | None
    ours_test_seeds: int = 0
    best_trial: int | None
    best_validation: float | None
    confirmed: Confirmed | None
    test: FinalScore | None
    test_uses: int
    test_reasons: tuple[str, ...] = ()
    seeds: int
    complete: int
    pruned: int
    failed: int
    devices: tuple[str, ...]
    training_hours: float


@dataclasses.dataclass(frozen=True)
class StudyOverview:
    """A study with everything that its section shows. `began` and `ended` are the machine's local time."""

    summary: StudySummary
    spec: StudySpec
    records: tuple[TrialRecord, ...] = ()
    rows: tuple[ReportRow, ...] = ()
    scores: tuple[FinalScore, ...] = ()
    importance: Importance | None = None
    versions: tuple[str, ...] = ()
    began: datetime | None = None
    ended: datetime | None = None

    @property
    def name(self) -> str:
        """The stored study's name."""
        return self.summary.study


@dataclasses.dataclass(frozen=True)
class Overview:
    """All studies in the order of the page, and why others could not be read."""

    studies: tuple[StudyOverview, ...]
    unread: dict[str, str]


def make_overview(place: Place) -> Overview:
    """Reads the study files and the database. Raises StorageError for a faulty database.

    A faulty study file, or a study that is not ours, is named in `unread` and hides none of the others.
    """
    storage = open_existing(place.storage)
    stored = study_names(storage)
    studies, unread = [], {}
    for name in page_order(list(study_files()), stored):
        try:
            study = find_study(storage, name) if name in stored else None
            studies.append(_declared(load_study(name)) if study is None else _stored(study, place))
        except CaltechHpoError as error:
            unread[name] = str(error).splitlines()[0]
        except ValidationError as error:
            unread[name] = f"stored by another version: {error.error_count()} values are not understood"
    return Overview(tuple(studies), unread)


def page_order(declared: Sequence[str], stored: Sequence[str]) -> list[str]:
    """The studies of the files, each followed by its NAME@K, then the other stored ones by name.

    What has run comes before what has not.
    """
    ran = {base_name(name) for name in stored}
    bases = list(dict.fromkeys([*(base_name(name) for name in declared), *sorted(ran)]))
    bases.sort(key=lambda base: base not in ran)
    known = [*declared, *(name for name in stored if name not in declared)]
    return [
        name
        for base in bases
        for name in sorted((name for name in known if base_name(name) == base), key=_repetition)
    ]


def _repetition(name: str) -> tuple[int, str]:
    number = name.partition("@")[2]
    return (int(number) if number.isdigit() else 1, name)


def _declared(spec: StudySpec) -> StudyOverview:
    """A study that the database does not hold."""
    rows = report_rows(spec, (), ())
    return StudyOverview(summarize(spec.name, spec, (), rows, in_database=False), spec, rows=rows)


def _stored(study: optuna.Study, place: Place) -> StudyOverview:
    spec, records = study_spec(study), trial_records(study)
    if SPEC_ATTR not in study.user_attrs and records:
        raise CaltechHpoError("was not made by caltech-hpo")
    taken = test_scores(study, place)
    rows = report_rows(spec, records, taken)
    trials = study.get_trials(deepcopy=False)
    began = [trial.datetime_start for trial in trials if trial.datetime_start]
    ended = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    versions = [trial.user_attrs.get("versions", {}) for trial in trials]
    scores = by_configuration(taken)
    return StudyOverview(
        summary=summarize(
            study.study_name, spec, records, rows, scores=scores, uses=test_uses(study, place),
            reasons=test_reasons(study, place), confirmed=confirmation(study, records, place),
        ),
        spec=spec,
        records=tuple(records),
        rows=rows,
        scores=scores,
        importance=importances(spec, records),
        versions=tuple(sorted({f"{name} {number}" for found in versions for name, number in found.items()})),
        began=min(began, default=None),
        ended=max(ended, default=None),
    )  # fmt: skip


def summarize(
    name: str, spec: StudySpec, records: Sequence[TrialRecord], rows: Sequence[ReportRow], *,
    in_database: bool = True,
    scores: Sequence[FinalScore] = (), uses: int = 0, reasons: tuple[str, ...] = (),
    confirmed: Confirmed | None = None,
) -> StudySummary:  # fmt: skip
    """The study on one line."""
    row = reference_row(spec)
    ours = next((one for one in rows if row and one.baseline == row.name), None)
    tests = {score.configuration: score for score in scores}
    best = best_record(list(records))
    states = {state: sum(record.state == state for record in records) for state in ("complete", "pruned")}
    # The score that counts: the confirmed winner's, else the best trial's, else the last one taken of a
    # configuration that is still there.
    winners = [confirmed.configuration] if confirmed else []
    winners += [best.recipe.configuration] if best and best.recipe else []
    counted = [tests[one] for one in winners if one in tests]
    there = known_configurations(records)
    counted += [score for score in reversed(scores) if score.configuration in there]
    return StudySummary(
        study=name,
        in_database=in_database,
        row=row.name if row else "",
        published=row.published if row else None,
        ours_trial=ours.trial if ours else None,
        ours_state=ours.state if ours else NOT_RUN,
        ours_validation=ours.val_accuracy if ours else None,
        ours_test=ours.test_accuracy if ours else None,
        ours_test_seeds=ours.test_seeds if ours else 0,
        best_trial=best.number if best else None,
        best_validation=best.value if best else None,
        confirmed=confirmed,
        test=counted[0] if counted else None,
        test_uses=uses,
        test_reasons=reasons,
        seeds=len({record.recipe.seed for record in records if record.recipe}),
        failed=sum(record.state == "failed" for record in records),
        devices=tuple(sorted({record.device for record in records if record.device})),
        training_hours=sum(record.seconds for record in records) / 3600,
        **states,
    )


def reference_row(spec: StudySpec) -> Baseline | None:
    """The hand-tuned row to compare with: the best published validation accuracy, or test accuracy.

    Where no accuracy was published, the first row with words in its place, or simply the first.
    """

    def rank(row: Baseline) -> tuple[float, bool]:
        published = row.published
        accuracy = published.test if published.validation is None else published.validation
        return (-1.0 if accuracy is None else accuracy, bool(published.outcome))

    return max(spec.baselines, key=rank, default=None)
