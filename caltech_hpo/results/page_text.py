"""The words and figures of the page of all studies, the same for Markdown and HTML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from caltech_hpo.results.evidence import Confirmed, FinalScore
from caltech_hpo.results.overview import StudyOverview, StudySummary
from caltech_hpo.results.report import COLUMNS, NOT_RUN, ReportRow
from caltech_hpo.spec import Published

NOTHING = "-"
SHORT = {"learning_rate": "LR", "step_size": "step", "batch_size": "batch"}
OPTIONAL = (
    "hand-tuned row", "validation, flip", "test, flip", "published loss", "published validation",
    "published test",
)  # fmt: skip
NOTES = (
    "Accuracies are top-1, 0 to 1. Validation accuracy chose the epoch, and the best trial among all: only "
    "the test score of a retrained model is free of that choice.",
    "Published: what the hand-tuned report printed for its best row; ours of that row: our run of the same "
    "values; our best: the search's best complete trial.",
    "95% intervals: of one training over test images (Wilson), of a mean over seeds (Student's t).",
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts in columns. `same` are columns left out because every row has the same text in them."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    same: tuple[tuple[str, str], ...] = ()


def accuracy(value: float | None) -> str:
    """Three digits, or a dash."""
    return NOTHING if value is None else f"{value:.3f}"


def count(number: int, noun: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def summary_table(summaries: Sequence[StudySummary]) -> Table:
    """A line for each study."""
    cells = [summary_cells(summary) for summary in summaries]
    columns = tuple(cells[0]) if cells else ("study",)
    return Table(columns, tuple(tuple(row.values()) for row in cells))


def summary_cells(made: StudySummary) -> dict[str, str]:
    """One study's texts by column."""
    published = made.published or Published()
    best = NOT_RUN
    if made.best_trial is not None:
        best = f"{accuracy(made.best_validation)} (trial {made.best_trial}, 1 seed)"
    elif made.complete + made.pruned + made.failed:
        best = "no complete trial"
    return {
        "study": made.study,
        "hand-tuned row": made.row or NOTHING,
        "published validation": published.outcome or accuracy(published.validation),
        "published test": accuracy(published.test),
        "ours of that row: validation": _ours(made),
        "ours of that row: test": _test(made.ours_test, made.ours_test_seeds)
        if made.ours_test is not None
        else NOT_RUN
        if made.row
        else NOTHING,
        "our best: validation": best,
        "confirmed": confirmed_text(made.confirmed),
        "final test (95% interval)": score_text(made.test) if made.test else NOT_RUN,
        "test set used": f"{made.test_uses} x",
        "complete / pruned / failed": f"{made.complete} / {made.pruned} / {made.failed}",
        "training": f"{hours(made.training_hours)} on {', '.join(made.devices)}" if made.devices else NOT_RUN,
    }


def _ours(made: StudySummary) -> str:
    if not made.row:
        return NOTHING
    if made.ours_validation is None:
        return made.ours_state
    return f"{accuracy(made.ours_validation)} ({made.ours_state}, trial {made.ours_trial})"


def score_text(score: FinalScore) -> str:
    """ "0.526 (0.508 to 0.545), 1 seed, trial 1"."""
    fitted = "" if score.fit_on == "train" else f", fitted on {score.fit_on}"
    return (
        f"{score.top1:.3f} ({score.low:.3f} to {score.high:.3f}), {count(score.seeds, 'seed')}, "
        f"trial {score.trial}{fitted}{score.leak_words}"
    )


def confirmed_text(confirmed: Confirmed | None) -> str:
    """The mean over fresh seeds."""
    if confirmed is None:
        return NOT_RUN
    interval = ""
    if confirmed.low is not None and confirmed.high is not None:
        interval = f" ({confirmed.low:.3f} to {confirmed.high:.3f})"
    return f"{confirmed.mean:.3f}{interval}, {count(confirmed.seeds, 'seed')}, trial {confirmed.trial}"


def hours(value: float) -> str:
    """Hours, or minutes below two of them."""
    return f"{value:.1f} h" if value >= 2 else f"{value * 60:.0f} min"


def facts(study: StudyOverview) -> list[tuple[str, str]]:
    """What a study's figures rest on, by label."""
    made = study.summary
    if not made.in_database:
        return [("state", NOT_RUN)]
    period = ""
    if study.began:
        period = f"{study.began:%Y-%m-%d %H:%M}"
        period += f" to {study.ended:%Y-%m-%d %H:%M}" if study.ended else ", still running"
    scored = [f"{score_text(score)}, mean per class {score.mean_per_class:.3f}" for score in study.scores]
    again = [f"again because: {reason}" for reason in made.test_reasons]
    return [
        ("trials", f"{made.complete} complete, {made.pruned} pruned, {made.failed} failed"),
        ("seeds", f"{count(made.seeds, 'seed')}; every trial is one training"),
        ("device", ", ".join(made.devices) or NOTHING),
        ("versions", ", ".join(study.versions) or NOTHING),
        ("time", f"{hours(made.training_hours)} of training; {period or 'no trial yet'}"),
        ("confirmed", confirmed_text(made.confirmed)),
        ("test set", "; ".join([f"used {count(made.test_uses, 'time')}", *scored, *again])),
        ("importance", importance_text(study)),
    ]


def importance_text(study: StudyOverview) -> str:
    """The importances on one line, or why there are none."""
    found = study.importance
    if found is None or found.shares is None:
        return found.reason if found else NOT_RUN
    shares = ", ".join(f"{name} {share:.2f}" for name, share in found.shares.items())
    return f"{shares} (PED-ANOVA over {found.complete} complete and {found.pruned} pruned trials)"


def row_table(study: StudyOverview) -> Table:
    """The study's trials as in `report`; parameters that never change go into `same`."""
    used = dict.fromkeys(name for row in study.rows for name in row.params)
    names = [*(name for name in COLUMNS if name in used), *(name for name in used if name not in COLUMNS)]
    cells = [_row_cells(row, names, study.summary.best_trial) for row in study.rows]
    labels = [SHORT.get(name, name) for name in names]
    same = tuple((name, cells[0][name]) for name in labels if len({row[name] for row in cells}) == 1)
    left_out = {name for name, _ in same}
    same = tuple((name, text) for name, text in same if text != NOTHING)
    left_out |= {name for name in OPTIONAL if all(row[name] == NOTHING for row in cells)}
    columns = tuple(name for name in cells[0] if name not in left_out) if cells else ()
    return Table(columns, tuple(tuple(row[name] for name in columns) for row in cells), same)


def _row_cells(row: ReportRow, names: Sequence[str], best: int | None) -> dict[str, str]:
    published = row.published or Published()
    number = NOTHING if row.trial is None else str(row.trial)
    return {
        "trial": f"{number} (best)" if row.trial is not None and row.trial == best else number,
        "hand-tuned row": row.baseline or NOTHING,
        **_params(row.params, names),
        "loss": NOTHING if row.final_loss is None else f"{row.final_loss:.3g}",
        "validation": accuracy(row.val_accuracy),
        "validation, flip": accuracy(row.val_accuracy_flip),
        "test": _test(row.test_accuracy, row.test_seeds),
        "test, flip": _test(row.test_accuracy_flip, row.test_seeds),
        "outcome": row.state if row.stop_reason in ("", "finished") else row.stop_reason.split(":")[0],
        "published loss": published.outcome
        or (NOTHING if published.final_loss is None else f"{published.final_loss:g}"),
        "published validation": accuracy(published.validation),
        "published test": accuracy(published.test),
    }


def _test(value: float | None, seeds: int) -> str:
    return NOTHING if value is None else f"{accuracy(value)}, {count(seeds, 'seed')}"


def _params(params: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    texts = {}
    for name in names:
        unused = name == "step_size" and params.get("schedule", "step") != "step"
        value = NOTHING if unused else params.get(name, NOTHING)
        texts[SHORT.get(name, name)] = f"{value:.3g}" if isinstance(value, float) else str(value)
    return texts
