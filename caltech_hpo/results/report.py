"""The report's table: each hand-tuned row beside our run of it, then the other trials."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from caltech_hpo.results import ledger
from caltech_hpo.results.analysis import Importance, importances
from caltech_hpo.results.evidence import Confirmed, confirmation, of_trials
from caltech_hpo.results.ledger import FinalResult, ScoreRow
from caltech_hpo.results.plots import draw_study_curves
from caltech_hpo.search.changes import study_spec
from caltech_hpo.search.records import TrialRecord, best_record, trial_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import stored_study
from caltech_hpo.spec import Baseline, Frozen, Published, StudySpec
from caltech_hpo.study_files import complete_params

NOT_RUN = "not run"
COLUMNS = ("learning_rate", "epochs", "step_size", "freeze", "augmentation", "batch_size")


class ReportRow(Frozen):
    """One training: ours, and what was published for the same values (None: nothing was).

    `trial` is None for a baseline that has not run. `test_accuracy` is where `final` scored it, the
    mean over `test_seeds` trainings; those with `_flip` are over each image and its mirror image.
    Accuracies are 0 to 1.
    """

    trial: int | None
    state: str
    baseline: str
    params: dict[str, Any]
    final_loss: float | None
    val_accuracy: float | None
    test_accuracy: float | None
    val_accuracy_flip: float | None = None
    test_accuracy_flip: float | None = None
    test_seeds: int = 0
    stop_reason: str
    published: Published | None


class Report(Frozen):
    """A study's table; `best` is the trial number of the best complete trial.

    `curves_problem` says why the curves could not be drawn. `confirmed` is the winner of
    `confirm`. `test_uses` counts the scorings on the test
    set; `test_reasons` says why later ones were made.
    """

    study: str
    rows: tuple[ReportRow, ...]
    best: int | None
    finals: tuple[FinalResult, ...]
    curves: str | None
    curves_problem: str = ""
    importance: Importance | None = None
    confirmed: Confirmed | None = None
    test_uses: int = 0
    test_reasons: tuple[str, ...] = ()


def make_report(name: str, place: Place) -> Report:
    """Reads the study and draws its curves into the home. Raises UsageError for an unknown study."""
    study = stored_study(place.storage, name)
    spec = study_spec(study)
    records = trial_records(study)
    scores, family = ledger.scores(place.storage, name), ledger.family_scores(place.storage, name)
    finals = tuple(score.result for score in of_trials(scores, records))
    best = best_record(records)
    curves, problem = None, ""
    if any(record.epochs for record in records):
        path = place.home / "reports" / name / "curves.png"
        try:
            curves = str(draw_study_curves(records, f"study {name}", path))
        except OSError as error:  # a read-only home still has its table
            problem = f"{path}: {error.strerror}"
    return Report(
        study=name,
        rows=report_rows(spec, records, scores),
        best=best.number if best else None,
        finals=finals,
        curves=curves,
        curves_problem=problem,
        importance=importances(spec, records),
        confirmed=confirmation(study, records, place),
        test_uses=len(family),
        test_reasons=tuple(dict.fromkeys(score.reason for score in family if score.reason)),
    )


def report_rows(
    spec: StudySpec, records: Sequence[TrialRecord], scores: Sequence[ScoreRow]
) -> tuple[ReportRow, ...]:
    """The baselines in the file's order (their latest run that counts), then the rest, best first.

    A test score belongs to the trials of its configuration: numbers are given again when a study is
    deleted and searched anew.
    """
    tests: dict[str, list[FinalResult]] = {}
    for score in scores:
        if score.fit_on == "train":
            tests.setdefault(score.configuration, []).append(score.result)
    fixed = spec.recipe.model_dump(include={*COLUMNS, "schedule"})

    def row(record: TrialRecord, published: Published | None) -> ReportRow:
        found = tests.get(record.recipe.configuration, []) if record.recipe else []
        flips = [result.test_accuracy_flip for result in found if result.test_accuracy_flip is not None]
        return ReportRow(
            trial=record.number, state=record.state, baseline=record.baseline,
            params={**fixed, **record.params}, final_loss=finite(record.final_loss),
            val_accuracy=record.value, val_accuracy_flip=record.value_flip,
            test_accuracy=mean([result.test_accuracy for result in found]),
            test_accuracy_flip=mean(flips), test_seeds=len(found),
            stop_reason=record.stop_reason, published=published,
        )  # fmt: skip

    rows, used = [], set()
    for baseline in spec.baselines:
        runs = [record for record in records if record.baseline == baseline.name]
        run = max(
            runs, key=lambda record: (record.state in ("complete", "pruned"), record.number), default=None
        )
        if run is not None:
            used.add(run.number)
            rows.append(row(run, baseline.published))
        else:
            rows.append(_not_run(baseline, {**fixed, **complete_params(spec, baseline.params)}))
    others = [record for record in records if record.number not in used and record.state != "waiting"]
    others.sort(key=lambda record: (record.state == "complete", record.value or 0.0), reverse=True)
    return (*rows, *(row(record, None) for record in others))


def _not_run(baseline: Baseline, params: dict[str, Any]) -> ReportRow:
    return ReportRow(
        trial=None, state=NOT_RUN, baseline=baseline.name, params=params, final_loss=None,
        val_accuracy=None, test_accuracy=None, stop_reason="", published=baseline.published,
    )  # fmt: skip


def mean(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return statistics.fmean(values) if values else None


def finite(value: float | None) -> float | None:
    """None in place of NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
