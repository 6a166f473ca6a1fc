"""What the dashboard tells beside Optuna's figures: notes in Markdown, of a trial and of a study."""

from __future__ import annotations

from collections.abc import Sequence

from caltech_hpo.ranges import Choices, Dimension
from caltech_hpo.results.evidence import Confirmed, FinalScore
from caltech_hpo.results.page import markdown_text as plain
from caltech_hpo.search.records import TrialRecord, best_record, finished_count
from caltech_hpo.spec import Hyperparameters, Published, StudySpec

# Rows of a trial's recipe that a note leaves out: hashes, and what the study's note says once.
UNTOLD = {"data", "weights_sha256", "classes", "fit_on"}
TRIALS_MORE = 20  # that the command to continue adds to a study whose last target is reached


def trial_note(record: TrialRecord, spec: StudySpec) -> str:
    """The outcome, the published values of a hand-tuned row, and the recipe."""
    lines = []
    row = next((row for row in spec.baselines if row.name == record.baseline), None)
    if record.baseline:
        lines.append(
            f"**Hand-tuned row:** {plain(record.baseline)}{_published(row.published if row else None)}"
        )
    lines.append(f"**{record.state}**{_reason(record)}{_reached(record)}")
    if record.recipe is not None:
        lines.append(_recipe_table(record))
    return "\n\n".join(lines)


def _reason(record: TrialRecord) -> str:
    return "" if record.stop_reason in ("", "finished") else f": {plain(record.stop_reason)}"


def _reached(record: TrialRecord) -> str:
    if record.best_epoch is None or record.value is None:
        return ""
    flip = "" if record.value_flip is None else f" ({record.value_flip:.4f} with test-time flip)"
    where = f", {record.device}, {record.precision}" if record.device else ""
    loss = "" if record.final_loss is None else f"; final training loss {record.final_loss:.3g}"
    of = f" of {record.recipe.epochs}" if record.recipe else ""
    return (
        f"; best validation top-1 **{record.value:.4f}**{flip} at epoch {record.best_epoch}; "
        f"{len(record.epochs)}{of} epochs in {record.seconds:.0f} s{where}{loss}"
    )


def _published(published: Published | None) -> str:
    if published is None or not (published.has_figures or published.outcome):
        return ""
    figures = {
        "final loss": published.final_loss, "validation": published.validation, "test": published.test,
    }  # fmt: skip
    words = [f"{name} {value:g}" for name, value in figures.items() if value is not None]
    return f"; published: {', '.join([*words, *([plain(published.outcome)] if published.outcome else [])])}"


def _recipe_table(record: TrialRecord) -> str:
    """What was searched, in bold, and what differs from the defaults."""
    assert record.recipe is not None
    defaults = {name: info.default for name, info in Hyperparameters.model_fields.items()}
    told = {
        name: value for name, value in record.recipe.model_dump().items()
        if name not in UNTOLD and (name in record.params or value != defaults.get(name))
    }  # fmt: skip
    rows = [
        f"| {f'**{name}**' if name in record.params else name} | {plain(_value(value))} |"
        for name, value in told.items()
    ]
    return "\n".join(["| recipe (searched in bold) | |", "|---|---|", *rows])


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def study_note(
    name: str, spec: StudySpec, records: Sequence[TrialRecord], *, confirmed: Confirmed | None = None,
    scores: Sequence[FinalScore] = (), uses: int = 0,
) -> str:  # fmt: skip
    """What the study is, where it stands, how to go on, and what it searches."""
    finished = finished_count(records)
    lines = [plain(spec.about.partition("\n\n")[0]), _standing(records), _best(records)]
    if confirmed:
        interval = "" if confirmed.low is None else f" (95%: {confirmed.low:.4f} to {confirmed.high:.4f})"
        lines.append(
            f"**Confirmed:** trial {confirmed.trial}, mean validation {confirmed.mean:.4f}{interval} over "
            f"{confirmed.seeds} fresh seeds"
        )
    lines += [
        f"**Test set:** trial {score.trial}, fitted on {plain(score.fit_on)}: top-1 **{score.top1:.4f}** "
        f"(95%: {score.low:.4f} to {score.high:.4f}), mean per class {score.mean_per_class:.4f}, "
        f"{score.seeds} seed{'s' if score.seeds > 1 else ''}{score.leak_words}"
        for score in scores
    ]
    lines.append(
        f"The test set was used {uses} time{'' if uses == 1 else 's'} on this study." if uses else ""
    )
    more = finished + TRIALS_MORE
    lines += [
        f"To search on ({TRIALS_MORE} trials more):\n\n    caltech-hpo search --study {name} --trials {more}",
        f"To confirm the best, then to score the test set:\n\n    caltech-hpo confirm --study {name}\n"
        f"    caltech-hpo final --study {name}",
        "The values that Optuna shows over a trial's steps are validation accuracies "
        + ("at percents of its schedule." if spec.pruner.compare_at == "fraction" else "of its epochs."),
        _spec_table(spec),
    ]
    return "\n\n".join(line for line in lines if line)


def _standing(records: Sequence[TrialRecord]) -> str:
    states = ("complete", "pruned", "failed", "running", "waiting")
    counts = {state: sum(record.state == state for record in records) for state in states}
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    hours = sum(record.seconds for record in records) / 3600
    return f"**Trials:** {words or 'none yet'}; {hours:.2f} hours of training"


def _best(records: Sequence[TrialRecord]) -> str:
    best = best_record(list(records))
    if best is None or best.value is None:
        return ""
    params = ", ".join(f"{name} {_value(value)}" for name, value in best.params.items())
    return f"**Best so far:** trial {best.number}, validation top-1 **{best.value:.4f}**: {plain(params)}"


def _spec_table(spec: StudySpec) -> str:
    fixed = {
        name: value for name, value in spec.recipe.model_dump(exclude_unset=True).items()
        if name not in spec.space
    }  # fmt: skip
    rows = [f"| {name} | {plain(_dimension(dimension))} |" for name, dimension in spec.space.items()]
    rows += [f"| {name} (fixed) | {plain(_value(value))} |" for name, value in fixed.items()]
    pruner = f"{spec.pruner.name}, not before epoch {spec.pruner.warmup_epochs}, by {spec.pruner.compare_at}"
    rows.append(f"| sampler | {spec.sampler.name}, {spec.sampler.startup_trials} random trials first |")
    rows.append(f"| pruner | {pruner} |")
    return "\n".join([f"| {plain(spec.data)}, spec {spec.hash} | |", "|---|---|", *rows])


def _dimension(dimension: Dimension) -> str:
    if isinstance(dimension, Choices):
        return ", ".join(str(choice) for choice in dimension.choices)
    return f"{dimension.low:g} to {dimension.high:g}{', log' if getattr(dimension, 'log', False) else ''}"
