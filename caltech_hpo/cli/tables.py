"""Answers for people: tables and texts from typed records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from caltech_hpo.cli.display import over, percent, short_params
from caltech_hpo.cli.final_tables import score_lines

if TYPE_CHECKING:
    from caltech_hpo.data.check import CheckResult
    from caltech_hpo.results.analysis import Importance
    from caltech_hpo.results.report import Report, ReportRow
    from caltech_hpo.search.records import TrialRecord
    from caltech_hpo.training.summary import ModelSummary


def table_of(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = (), title: str = ""
) -> Table:
    """A table; columns named in `left` are flush left, the others right. Texts are taken literally."""
    table = Table(title=escape(title) or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def record_json(record: TrialRecord | None) -> dict[str, Any] | None:
    """A trial for --json."""
    if record is None:
        return None
    return {
        "trial": record.number, "params": record.params, "val_accuracy": record.value,
        "best_epoch": record.best_epoch, "final_loss": record.final_loss, "seconds": round(record.seconds, 1),
    }  # fmt: skip


def studies_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The studies with what the database holds of each."""
    cells = []
    for row in rows:
        best = row["best"]
        title = row["about"].partition("\n")[0].partition(":")[0]
        cells.append(
            [row["study"], title, row["data"], str(len(row["baselines"])), str(row["finished"]),
             percent(best["val_accuracy"]) if best else "-"]
        )  # fmt: skip
    columns = ("study", "what", "data", "baselines", "finished", "best val")
    return table_of(columns, cells, left=("study", "what", "data"))


def study_text(document: dict[str, Any]) -> Group:
    """One study in full."""
    fixed = {name: value for name, value in document["recipe"].items() if name not in document["space"]}
    space = table_of(
        ("searched", "values"),
        [[name, _dimension(dimension)] for name, dimension in document["space"].items()],
        left=("searched", "values"),
    )
    baselines = table_of(
        ("baseline", "published loss", "validation", "test"),
        [[row["name"], *_published(row["published"])] for row in document["baselines"]],
        left=("baseline",),
    )
    best = document["best"]
    found = f"{document['finished']} finished of {document['trials']} trials in the database"
    if best:
        found += f"; best: trial {best['trial']}, validation {percent(best['val_accuracy'])}, "
        found += short_params(best["params"])
    return Group(
        escape(f"study {document['study']}  ({document['file']})"), "", escape(document["about"]), "",
        escape("fixed: " + ", ".join(f"{name} {value}" for name, value in fixed.items())), space,
        escape(f"sampler: {_options(document['sampler'])}; pruner: {_options(document['pruner'])}"),
        *([baselines] if document["baselines"] else []),
        *(escape(f"warning: {warning}") for warning in document["warnings"]), escape(found),
    )  # fmt: skip


def _options(table: dict[str, Any]) -> str:
    return ", ".join(str(value) if name == "name" else f"{name} {value}" for name, value in table.items())


def _dimension(dimension: dict[str, Any]) -> str:
    if "choices" in dimension:
        return ", ".join(str(choice) for choice in dimension["choices"])
    text = f"{dimension['low']:g} to {dimension['high']:g}"
    if dimension.get("log"):
        text += ", log"
    return text + (f", step {dimension['step']}" if dimension.get("step", 1) != 1 else "")


def _published(values: dict[str, Any]) -> list[str]:
    if values["outcome"]:
        return [values["outcome"], "-", "-"]
    loss = values["final_loss"]
    return ["-" if loss is None else f"{loss:g}", percent(values["validation"]), percent(values["test"])]


def report_table(made: Report) -> RenderableType:
    """The report's table, with the published values on the right.

    Columns that are the same in every row go into a line below, so that the table fits a terminal.
    """
    cells = [_report_cells(row, made.best) for row in made.rows]
    same = [
        name for name in ("step", "freeze", "augmentation", "batch", "others")
        if len({row[name] for row in cells}) == 1
    ]  # fmt: skip
    empty = {
        name for name in ("val+flip", "test", "test+flip", "published")
        if all(row[name] in ("-", "") for row in cells)
    }  # fmt: skip
    columns = [name for name in cells[0] if name not in same and name not in empty] if cells else []
    same = [name for name in same if cells[0][name] not in ("-", "")]
    table = Table(
        title=escape(
            f"study {made.study}: our trials"
            + (", and what the report published" if "published" in columns else "")
        ),
        title_justify="left",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("outcome", "augmentation", "others") else "right",
            no_wrap=name != "others",
        )  # fmt: skip
    for row in cells:
        table.add_row(*(escape(row[name]) for name in columns))
    lines = []
    if same:  # here is room for the whole name
        first = cells[0] | {"augmentation": made.rows[0].params["augmentation"]}
        lines.append("every row: " + ", ".join(f"{name} {first[name]}" for name in same))
    lines.append(
        "* best complete trial; B hand-tuned baseline; one seed where none are given; "
        "published: loss, validation, test"
    )
    lines += score_lines(made)
    if made.importance:
        lines.append(importance_text(made.importance))
    lines.append(f"curves: {made.curves or made.curves_problem or 'none yet'}")
    return Group(table, *(escape(line) for line in lines))


def importance_text(importance: Importance) -> str:
    """The importances on one line, with what they rest on."""
    if importance.shares is None:
        return f"importance: {importance.reason}"
    shares = ", ".join(f"{name} {share:.2f}" for name, share in importance.shares.items())
    trials = f"{importance.complete} complete and {importance.pruned} pruned trials"
    return f"importance (PED-ANOVA, {trials}): {shares}"


def _report_cells(row: ReportRow, best: int | None) -> dict[str, str]:
    from caltech_hpo.results.report import COLUMNS

    params = row.params
    mark = ("*" if row.trial is not None and row.trial == best else "") + ("B" if row.baseline else "")
    published = _published(row.published.model_dump()) if row.published else []
    return {
        "trial": f"{'-' if row.trial is None else row.trial} {mark}".strip(),
        "LR": f"{params['learning_rate']:.3g}",
        "epochs": str(params["epochs"]),
        "step": str(params["step_size"]) if params.get("schedule", "step") == "step" else "-",
        "freeze": params["freeze"],
        "augmentation": params["augmentation"].replace("_crop", ""),
        "batch": str(params["batch_size"]),
        "others": short_params(
            {name: value for name, value in params.items() if name not in (*COLUMNS, "schedule")}
        ),
        "loss": "-" if row.final_loss is None else f"{row.final_loss:.3g}",
        "val": percent(row.val_accuracy),
        "val+flip": percent(row.val_accuracy_flip),
        "test": percent(row.test_accuracy) + over(row.test_seeds),
        "test+flip": percent(row.test_accuracy_flip)
        + ("" if row.test_accuracy_flip is None else over(row.test_seeds)),
        "outcome": row.state if row.stop_reason in ("", "finished") else row.stop_reason.split(":")[0],
        "published": " ".join(published)
        if any(text != "-" for text in published)
        else "-"
        if published
        else "",
    }


def check_table(result: CheckResult) -> Group:
    """Counts of each class, and the faults."""
    counts = [(row.training, row.validation, row.test) for row in result.classes]
    rows = [
        [row.name, *(str(n) for n in numbers), str(sum(numbers))]
        for row, numbers in zip(result.classes, counts, strict=True)
    ]
    totals = [sum(column) for column in zip(*counts, strict=True)]
    rows.append([f"{len(result.classes)} classes", *(str(n) for n in totals), str(sum(totals))])
    table = table_of(("class", "training", "validation", "test", "all"), rows, left=("class",))
    lines = [f"{result.root}", f"split: {result.split_source}"]
    if result.unlisted:
        lines.append(f"{result.unlisted} images are in neither list and are not used")
    lines.append(f"unreadable images: {len(result.unreadable)}")
    lines += [f"  {path}: {why}" for path, why in result.unreadable.items()]
    for found, what in (
        (result.leaks, "leaks, groups of the same pixels in test and in training or validation"),
        (result.duplicates, "duplicates, groups of the same pixels in training and validation"),
        (
            result.contradictions,
            "contradictions, groups of the same pixels in one split, but several classes",
        ),
    ):
        lines.append(f"{what}: {len(found)}")
        lines += ["  " + " = ".join(group) for group in found]
    return Group(table, *(escape(line) for line in lines))


def models_table(rows: Sequence[ModelSummary]) -> Group:
    """The architectures side by side."""
    cells = [
        [row.architecture, str(row.layers), f"{row.parameters / 1e6:.1f} M", f"{row.flops / 1e9:.2f} G",
         f"{row.activation_bytes / 2**20:.1f} MiB"]
        for row in rows
    ]  # fmt: skip
    columns = ("architecture", "layers", "parameters", "FLOPs an image", "activations an image")
    table = table_of(columns, cells, left=("architecture",))
    note = (
        f"crop {rows[0].crop}, {rows[0].classes} classes; layers: convolutions and linear layers; "
        "FLOPs: forward pass, a multiplication and an addition are two; "
        "activations: kept for the backward pass, fp32"
    )
    return Group(table, note)
