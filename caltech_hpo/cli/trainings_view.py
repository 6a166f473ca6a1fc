"""The progress of trainings side by side: those of `confirm` and of `final`."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from caltech_hpo.cli.display import EPOCH_EVERY, duration, percent, underway

if TYPE_CHECKING:
    from caltech_hpo.search.messages import EpochPart
    from caltech_hpo.spec import EpochResult, Recipe


SPEED_OVER = 3600.0  # seconds; the time left would jump with each epoch's validation
RECENT = 20  # epochs that the time left is foretold with: the machine may have been slower before


def training_name(trial: int, recipe: Recipe) -> str:
    """ "trial 3 seed 0"."""
    return f"trial {trial} seed {recipe.seed}"


class TrainingsView:
    """A bar for each running training on a terminal, a line an epoch elsewhere."""

    def __init__(self, console: Console, names: Sequence[str], epochs: int, workers: int) -> None:
        """`names` are all trainings to come, `epochs` those of all of them together."""
        self._console, self._workers = console, min(workers, len(names))
        self._places = {name: number for number, name in enumerate(names, start=1)}
        self._epochs_left = epochs
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, speed_estimate_period=SPEED_OVER,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}  # when a training's last line was printed

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keeps the bars on the screen."""
        if not self._console.is_terminal or not self._places:
            yield
            return
        with self._bars:
            yield

    def started(self, name: str, epochs: int, *, resumed: bool, lost: bool = False) -> None:
        """A training begins, or goes on; `lost`: since its worker was killed."""
        if self._console.is_terminal and not lost:
            self._tasks[name] = self._bars.add_task(name, total=epochs)
        how = "goes on from its checkpoint" if resumed else "begins anew" if lost else "starts"
        text = f"{name} {how} ({self._places[name]} of {len(self._places)} trainings)"
        if lost:
            text = f"{name}: its worker was killed; it {how}"
        self._told[name] = time.monotonic() - EPOCH_EVERY * resumed  # where in its epoch is news
        (self.tell if resumed or lost else self.line)(text)

    def underway(self, name: str, part: EpochPart, epochs: int) -> None:
        """Where a training of so many `epochs` is."""
        if name in self._tasks:
            # the epoch is over when its validation images are scored
            self._bars.update(
                self._tasks[name], completed=part.epoch - 1 + min(part.images / part.total, 0.99)
            )
        elif time.monotonic() - self._told[name] >= EPOCH_EVERY:
            self._told[name] = time.monotonic()
            self.line(f"{name} {underway(part, epochs)}")

    def epoch(self, name: str, result: EpochResult, epochs: int, *, before: bool) -> None:
        """One of a training's `epochs` is over; those from `before` its checkpoint get no line."""
        self._epochs_left -= 1
        text = f"loss {result.training_loss:.4f}"
        if result.validation_top1 is not None:
            text += f", validation {percent(result.validation_top1)}"
        if not before:
            self._told[name] = time.monotonic()
            self._seconds.append(result.seconds)
            left = duration(statistics.median(self._seconds) * self._epochs_left / self._workers)
            self.line(f"{name} epoch {result.epoch}/{epochs}: {text}, {result.seconds:.0f} s, {left} left")
        if name in self._tasks:
            self._bars.update(self._tasks[name], completed=result.epoch, description=f"{name}: {text}; epoch")

    def ended(self, name: str, text: str, *, epochs_left: int = 0) -> None:
        """A training has ended, so many epochs before its last."""
        self._epochs_left -= epochs_left
        self.line(f"{name} {text}")

    def line(self, text: str) -> None:
        """A line where there are no bars."""
        if not self._console.is_terminal:
            self.tell(text)

    def tell(self, text: str) -> None:
        """A line, above the bars where there are some: they live on this console."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
