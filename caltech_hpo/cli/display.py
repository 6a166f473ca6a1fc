"""Progress on a terminal, and how numbers are written."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from caltech_hpo.search.messages import EpochPart

SHORT = {
    "learning_rate": "lr",
    "step_size": "step",
    "batch_size": "batch",
    "weight_decay": "wd",
    "momentum": "mom",
    "label_smoothing": "smooth",
    "head_lr_factor": "head lr x",
    "frozen_blocks": "frozen",
    "color_jitter": "jitter",
    "smallest_area": "area",
}
PLAIN_EVERY = 5.0  # seconds between progress lines where there is no terminal
EPOCH_EVERY = 30.0  # and within an epoch: hundreds of them may follow one another


def short_params(params: dict[str, Any]) -> str:
    """Parameters on one line: "lr 0.05 step 35 random_crop"."""
    parts = []
    for name, value in params.items():
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        parts.append(text if isinstance(value, str) else f"{SHORT.get(name, name)} {text}")
    return " ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as "45 s", "2 min 05 s", "12 min" or "3 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: float | None) -> str:
    """An accuracy from 0 to 1 with three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def images_of(part: EpochPart) -> str:
    """ "1,024 of 2,892 images"."""
    return f"{part.images:,} of {part.total:,} images"


def underway(part: EpochPart, epochs: int) -> str:
    """ "epoch 4/60: 1,024 of 2,892 images"."""
    return f"epoch {part.epoch}/{epochs}: {images_of(part)}"


def over(seeds: int) -> str:
    """How many seeds a mean is over, to follow it; nothing for one or none."""
    return f" ({seeds} seeds)" if seeds > 1 else ""


class ProgressBars:
    """A `Progress` callback of the data room: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console, transient=True,
            redirect_stdout=sys.stdout.isatty(),  # a file must get its answer while bars are shown
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._last: dict[str, float] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        """Shows `done` of `total`."""
        if not self._console.is_terminal:
            self._plain(label, done, total)
            return
        if label not in self._tasks:
            self._bars.start()
            self._tasks[label] = self._bars.add_task(escape(label), total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)

    def _plain(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self._last.setdefault(label, now)
        if now - began >= PLAIN_EVERY or (done == total and label in self._tasks):
            self._last[label] = now
            self._tasks[label] = True
            self._console.print(f"{label}: {done:,} of {total:,}", markup=False, highlight=False)

    def close(self) -> None:
        """Removes the bars."""
        if self._bars.live.is_started:
            self._bars.stop()
