"""The live table of a search on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from caltech_hpo.cli.display import (
    EPOCH_EVERY,
    ProgressBars,
    duration,
    images_of,
    percent,
    short_params,
    underway,
)

if TYPE_CHECKING:
    from caltech_hpo.search.events import SearchEvent
    from caltech_hpo.search.forecast import Forecaster
    from caltech_hpo.search.messages import EpochPart
    from caltech_hpo.search.records import TrialRecord
    from caltech_hpo.spec import EpochResult

ROWS = 12
FORECAST_EVERY = 0.5  # seconds: a forecast takes milliseconds, for which the workers wait


@dataclass
class _Row:
    number: int
    params: dict[str, Any]
    epochs: int
    note: str
    state: str = "running"
    doing: str = ""  # before the first epoch, and within each
    done: int = 0  # epochs of an earlier search
    latest: EpochResult | None = None
    best: float | None = None
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)  # when its last line was printed


class SearchView:
    """The live table of a search on a terminal; plain lines elsewhere."""

    def __init__(
        self, console: Console, study: str, trials: int, records: Sequence[TrialRecord],
        forecaster: Forecaster | None,
    ) -> None:  # fmt: skip
        self._console, self._study, self._trials = console, study, trials
        self._forecaster = forecaster
        done = [record for record in records if record.state in ("complete", "pruned")]
        self._finished = len(done)
        complete = [
            record.value for record in done if record.state == "complete" and record.value is not None
        ]
        self._best = max(complete, default=None)
        self._left = "unknown time"
        self._forecast_next = 0.0
        self._rows: dict[int, _Row] = {}
        self._lines = ProgressBars(console)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keeps the table on the screen while the search runs."""
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._render, console=self._console, refresh_per_second=2):
            yield

    def handle(self, event: SearchEvent) -> None:
        """Takes in one event."""
        from caltech_hpo.search import events

        if self._forecaster:
            self._forecaster.handle(event)
            if isinstance(event, events.TrialEnded) or time.monotonic() >= self._forecast_next:
                found = self._forecaster.forecast(self._trials)
                self._left = duration(found.seconds) if found else self._left
                self._forecast_next = time.monotonic() + FORECAST_EVERY
        if isinstance(event, events.TrialStarted):
            self._rows[event.number] = _Row(event.number, event.params, event.epochs, event.baseline)
            note = f" [baseline {event.baseline}]" if event.baseline else ""
            self._line(f"trial {event.number} starts: {short_params(event.params)}{note}")
        elif isinstance(event, events.TrialWorking):
            self._rows[event.number].doing = f"{event.what}: {event.done:,} of {event.total:,}"
            if not self._console.is_terminal:
                self._lines(event.what, event.done, event.total)
        elif isinstance(event, events.TrialUnderway):
            self._underway(event.number, event.part)
        elif isinstance(event, events.TrialEpoch):
            self._epoch(event.number, event.result, event.best)
        elif isinstance(event, events.TrialEnded):
            self._ended(event.number, event.state, event.value, event.stop_reason)
        elif isinstance(event, events.TrialResumed):
            row = _Row(event.number, event.params, event.epochs, event.baseline, done=event.done)
            row.told -= EPOCH_EVERY  # where in its epoch it goes on is news
            self._rows[event.number] = row
            lost = ": its worker died; it" if event.lost else ""
            done = f"{event.done} of {event.epochs} epochs were recorded"
            self._line(f"trial {event.number}{lost} goes on: {done}")
        elif isinstance(event, events.TrialPaused):
            late = "" if event.saved else ", too slow to be saved: it goes on from its last checkpoint"
            self._rows[event.number].state = f"paused{late}"
            self._line(f"trial {event.number} is paused{late}")
        elif isinstance(event, events.NoRoom):
            self._line(f"{event.message}: the search waits for it")
        elif isinstance(event, events.Requeued):
            self._line(f"trial {event.number} never began; its parameters are queued again")

    def _underway(self, number: int, part: EpochPart) -> None:
        row = self._rows[number]
        row.doing = images_of(part)
        if time.monotonic() - row.told >= EPOCH_EVERY:
            row.told = time.monotonic()
            self._line(f"trial {number} {underway(part, row.epochs)}")

    def _epoch(self, number: int, result: EpochResult, best: float) -> None:
        row = self._rows[number]
        row.latest, row.best, row.doing, row.told = result, best, "", time.monotonic()
        self._line(
            f"trial {number} epoch {result.epoch}/{row.epochs}: loss {result.training_loss:.4f}, "
            f"validation {percent(result.validation_top1)} (best of trial {percent(best)}, of study "
            f"{percent(self._best)}), {result.seconds:.0f} s{_in_pieces(result)}, {self._left} left"
        )

    def _ended(self, number: int, state: str, value: float | None, reason: str) -> None:
        row = self._rows[number]
        row.state = state if reason in ("", "finished") else f"{state}: {reason}"
        if state in ("complete", "pruned"):
            self._finished += 1
        if state == "complete" and value is not None:
            self._best = max(value, self._best or 0.0)
        self._line(
            f"trial {number} {row.state}, best validation {percent(value)}; "
            f"{self._finished} of {self._trials} finished, best of study {percent(self._best)}"
        )

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        table = Table(
            title=f"study {escape(self._study)}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for name in ("trial", "parameters", "epoch", "loss", "validation", "best", "state"):
            table.add_column(name, justify="left" if name in ("parameters", "state") else "right")
        for row in list(self._rows.values())[-ROWS:]:
            latest = row.latest
            table.add_row(
                str(row.number),
                escape(short_params(row.params) + (f"  ({row.note})" if row.note else "")),
                f"{latest.epoch if latest else row.done}/{row.epochs}",
                f"{latest.training_loss:.4f}" if latest else "-",
                percent(latest.validation_top1 if latest else None),
                percent(row.best),
                escape(row.state if row.state != "running" else self._running_note(row)),
            )
        foot = (
            f"{self._finished} of {self._trials} trials finished, best validation {percent(self._best)}, "
            f"{self._left} left"
        )
        return Group(table, foot)

    def _running_note(self, row: _Row) -> str:
        took = f"running, {duration(time.monotonic() - row.began)}"
        return row.doing or took + (_in_pieces(row.latest) if row.latest else "")


def _in_pieces(result: EpochResult) -> str:
    return f", {result.micro_batch} images at a time" if result.micro_batch else ""
