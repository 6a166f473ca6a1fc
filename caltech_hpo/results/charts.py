"""optuna.visualization's plots of a study: as plotly JSON for a page, and as PNG files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caltech_hpo.results.analysis import scored_records, study_of
from caltech_hpo.results.plots import save
from caltech_hpo.search.records import TrialRecord
from caltech_hpo.spec import Frozen, StudySpec

if TYPE_CHECKING:
    import optuna

METRIC = "validation accuracy"
BLUES = [[0.0, "#9ecae1"], [0.5, "#3182bd"], [1.0, "#08306b"]]
HISTORY, PARALLEL, IMPORTANCE = "history", "parallel", "importance"


class Chart(Frozen):
    """One plot: `figure` is plotly's JSON, safe inside a script element; `image` the PNG of the same."""

    kind: str
    title: str
    figure: str
    image: Path


def draw_charts(
    spec: StudySpec, records: Sequence[TrialRecord], folder: Path, *, important: bool
) -> list[Chart]:
    """History over complete trials; parallel coordinates and importances over pruned ones too.

    A plot that has nothing to show is left out; `important` says whether there are importances.
    """
    scored = scored_records(records)
    complete = [record for record in scored if record.state == "complete"]
    charts = []
    if complete:
        charts.append(
            _draw(HISTORY, "Optimization history, complete trials", study_of(spec, complete), folder)
        )
    if scored:
        everything = study_of(spec, scored)
        title = "Parallel coordinates; pruned trials with their best accuracy so far"
        charts.append(_draw(PARALLEL, title, everything, folder))
        if important:
            title = "Importance of the hyperparameters, pruned trials counted"
            charts.append(_draw(IMPORTANCE, title, everything, folder))
    return charts


def _draw(kind: str, title: str, study: optuna.Study, folder: Path) -> Chart:
    return Chart(
        kind=kind, title=title, figure=_plotly(kind, study), image=_png(kind, study, folder / f"{kind}.png")
    )


def _plot(kind: str, module: Any, study: optuna.Study) -> Any:
    """Calls a plot function of optuna.visualization or of its matplotlib twin."""
    if kind == IMPORTANCE:
        return module.plot_param_importances(study)
    plots: dict[str, Callable[..., Any]] = {
        HISTORY: module.plot_optimization_history, PARALLEL: module.plot_parallel_coordinate,
    }  # fmt: skip
    # Named, but not given: with a target of its own Optuna forgets that higher is better.
    return plots[kind](study, target_name=METRIC)


def _plotly(kind: str, study: optuna.Study) -> str:
    import optuna.visualization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = _plot(kind, optuna.visualization, study)
    # Optuna's scale begins with a blue that is nearly white.
    figure.update_traces(line_colorscale=BLUES, selector={"type": "parcoords"})
    figure.update_layout(
        title=None, template="plotly_white", margin={"l": 60, "r": 30, "t": 50, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    document = {key: value for key, value in json.loads(figure.to_json()).items() if key != "frames"}
    return json.dumps(document).replace("<", "\\u003c")  # no text in it can end the script element


def _png(kind: str, study: optuna.Study, path: Path) -> Path:
    import matplotlib
    import optuna.visualization.matplotlib
    from matplotlib import pyplot

    # Optuna draws with pyplot and sets its style: Agg needs no screen, the context undoes the style.
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")
        pyplot.switch_backend("agg")
        axes = _plot(kind, optuna.visualization.matplotlib, study)
        made = axes.figure
        axes.set_title("")
        made.set_size_inches(9, 4.5)
        made.set_layout_engine("tight")
        save(made, path)
        pyplot.close(made)
    return path
