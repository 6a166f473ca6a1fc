"""Draws records: curves and confusion matrices. Nothing here computes a score."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from caltech_hpo.search.records import TrialRecord
from caltech_hpo.spec import EpochResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TICK_LIMIT = 120  # more class names than this cannot be read beside a matrix


def figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window (pyplot would keep it alive and look for a screen)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(made: Figure, path: Path) -> Path:
    """Writes a PNG whole: temporary file, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    made.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
    return path


def png(made: Figure) -> bytes:
    """The figure as a PNG file's content."""
    content = io.BytesIO()
    made.savefig(content, dpi=120, format="png")
    return content.getvalue()


def draw_training_curves(epochs: Sequence[EpochResult], title: str, path: Path) -> Path:
    """Writes `training_curves` to a file."""
    return save(training_curves(epochs, title), path)


def training_curves(epochs: Sequence[EpochResult], title: str) -> Figure:
    """Loss (training, validation) and validation accuracy of one training."""
    made = figure(10, 4)
    loss, accuracy = made.subplots(1, 2)
    numbers = [result.epoch for result in epochs]
    loss.plot(numbers, [result.training_loss for result in epochs], label="training")
    validated = [result for result in epochs if result.validation_top1 is not None]
    if validated:
        seen = [result.epoch for result in validated]
        loss.plot(seen, [result.validation_loss or float("nan") for result in validated], label="validation")
        accuracy.plot(seen, [result.validation_top1 or 0.0 for result in validated], color="C1")
        best = max(validated, key=lambda result: result.validation_top1 or 0.0)
        accuracy.axvline(best.epoch, linestyle=":", color="grey", label=f"best: epoch {best.epoch}")
        accuracy.legend()
    else:
        accuracy.text(
            0.5, 0.5, "trained on the validation images too", ha="center", transform=accuracy.transAxes
        )
    loss.legend()
    _label(loss, "cross entropy")
    _label(accuracy, "validation top-1 accuracy")
    made.suptitle(title)
    return made


def draw_study_curves(records: Sequence[TrialRecord], title: str, path: Path, most: int = 10) -> Path:
    """Training loss and validation accuracy of a study's best `most` trials; the others in grey."""
    made = figure(12, 5)
    loss, accuracy = made.subplots(1, 2)
    drawn = sorted(
        (record for record in records if record.epochs), key=lambda record: record.value or 0.0, reverse=True
    )
    for rank, record in enumerate(drawn):
        numbers = [result.epoch for result in record.epochs]
        style: dict[str, Any] = (
            {"color": f"C{rank}", "label": curve_label(record)} if rank < most else {"color": "0.85"}
        )
        style["zorder"] = 2 if rank < most else 1
        loss.plot(numbers, [result.training_loss for result in record.epochs], marker=".", **style)
        accuracy.plot(numbers, [result.validation_top1 for result in record.epochs], marker=".", **style)
    _label(loss, "training loss")
    _label(accuracy, "validation top-1 accuracy")
    if drawn:
        accuracy.legend(fontsize="small")
    made.suptitle(title)
    return save(made, path)


def curve_label(record: TrialRecord) -> str:
    """A curve's name in a legend."""
    rate = record.params.get("learning_rate")
    text = f"trial {record.number}" + (f", LR {rate:.3g}" if rate is not None else "")
    return text + (f" ({record.state})" if record.state != "complete" else "")


def draw_confusion(matrix: NDArray[np.int64], classes: Sequence[str], title: str, path: Path) -> Path:
    """The confusion matrix (classes, classes), rows true, as shares of each true class."""
    side = max(5.0, min(22.0, 0.19 * len(classes) + 3))
    made = figure(side, side * 0.92)
    axes = made.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    made.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    if len(classes) <= TICK_LIMIT:
        size = 6 if len(classes) > 30 else 9
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
        axes.set_yticks(range(len(classes)), classes, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title)
    return save(made, path)


def _label(axes: Any, quantity: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
