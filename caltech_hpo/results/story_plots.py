"""The dashboard's own plots of a study, as plotly figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from caltech_hpo.search.records import TrialRecord
from caltech_hpo.spec import StudySpec

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_CURVES = 10
ACCURACY = "validation top-1 accuracy"


def story_plots(spec: StudySpec, records: Sequence[TrialRecord]) -> dict[str, go.Figure]:
    """By id; a plot that has nothing to show is left out."""
    scored = [record for record in records if record.value is not None and record.state != "failed"]
    if not scored:
        return {}
    plots = {"best-curves": best_curves(scored), "accuracy-over-time": accuracy_over_time(scored)}
    published = against_published(spec, scored)
    return plots if published is None else plots | {"ours-against-published": published}


def best_curves(records: Sequence[TrialRecord]) -> go.Figure:
    """Validation accuracy by epoch of the ten best trials."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for record in sorted(records, key=lambda record: -(record.value or 0.0))[:MOST_CURVES]:
        figure.add_scatter(
            x=[result.epoch for result in record.epochs],
            y=[result.validation_top1 for result in record.epochs],
            mode="lines+markers" if len(record.epochs) == 1 else "lines",
            name=f"trial {record.number}: {record.value:.3f}",
        )
    return _labelled(figure, "The ten best trials", "epoch", ACCURACY)


def accuracy_over_time(records: Sequence[TrialRecord]) -> go.Figure:
    """Each trial's accuracy over the hours that all trials up to its end were trained, by number."""
    import plotly.graph_objects as go

    hours, best, total, highest = [], [], 0.0, 0.0
    for record in records:
        total += record.seconds / 3600
        if record.state == "complete":
            highest = max(highest, record.value or 0.0)
        hours.append(total)
        best.append(highest or None)
    figure = go.Figure()
    for state in ("complete", "pruned", "running"):
        mine = [i for i, record in enumerate(records) if record.state == state]
        if mine:
            figure.add_scatter(
                x=[hours[i] for i in mine], y=[records[i].value for i in mine], mode="markers", name=state,
                text=[f"trial {records[i].number}" for i in mine],
            )  # fmt: skip
    figure.add_scatter(x=hours, y=best, mode="lines", name="best complete", line={"shape": "hv"})
    devices = sorted({record.device for record in records if record.device})
    on = f" on {', '.join(devices)}" if devices else ""
    return _labelled(figure, "Accuracy over training time", f"hours of training{on}, all trials", ACCURACY)


def against_published(spec: StudySpec, records: Sequence[TrialRecord]) -> go.Figure | None:
    """Our run of each hand-tuned row over its published validation accuracy; None without such rows."""
    import plotly.graph_objects as go

    published = {
        row.name: row.published.validation for row in spec.baselines if row.published.validation is not None
    }
    ours = {
        record.baseline: record for record in records
        if record.baseline in published and record.state in ("complete", "pruned")
    }  # fmt: skip
    if not ours:
        return None
    x, y = [published[name] for name in ours], [record.value or 0.0 for record in ours.values()]
    figure = go.Figure()
    figure.add_scatter(
        x=x, y=y, mode="markers+text", text=[f"trial {record.number}" for record in ours.values()],
        textposition="top center", hovertext=list(ours), name="hand-tuned rows", marker={"size": 10},
    )  # fmt: skip
    low, high = min(*x, *y), max(*x, *y)
    figure.add_scatter(x=[low, high], y=[low, high], mode="lines", name="equal", line={"dash": "dot"})
    best = max((record.value or 0.0 for record in records if record.state == "complete"), default=None)
    if best is not None:
        figure.add_hline(y=best, line_dash="dash", annotation_text=f"the search's best: {best:.3f}")
    return _labelled(figure, "Ours against published", "published validation accuracy", "ours")


def _labelled(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white")
    return figure
