"""`replay`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

from caltech_hpo.cli.display import duration, percent
from caltech_hpo.cli.options import (
    DEFAULT_HOME,
    Home,
    Json,
    Storage,
    Study,
    answer,
    goes_on,
    place_of,
    progress_bars,
)
from caltech_hpo.cli.tables import table_of

if TYPE_CHECKING:
    from caltech_hpo.results.replay import PrunerReplay, Replay
    from caltech_hpo.spec import PrunerSpec


class CompareChoice(StrEnum):
    """For --compare-at."""

    epoch = "epoch"
    fraction = "fraction"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(replay)


def replay(
    study: Study,
    pruner: Annotated[
        list[str] | None,
        typer.Option(
            help="median, percentile, hyperband or none; with settings: NAME:FIELD=VALUE[,...]. Repeatable.",
            show_default="the study's own, and all three at epoch and fraction",
        ),
    ] = None,
    compare_at: Annotated[
        CompareChoice | None, typer.Option(help="Where trials of different lengths are compared.")
    ] = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show what each pruner would have saved of a search, and whether it would have lost the winner.

    Feeds the stored curves to the pruners again; nothing is trained. The answer is whole for a search
    made with --no-pruning.

    Example: caltech-hpo replay --study alexnet-scratch --pruner median --pruner percentile:percentile=25
    """
    from caltech_hpo.results.replay import replay as replay_study

    with goes_on(kept=False), progress_bars() as bars:
        made = replay_study(
            study, place_of(home, storage), pruners=pruner or (),
            compare_at=compare_at.value if compare_at else None, progress=bars,
        )  # fmt: skip
    answer(made.model_dump(mode="json"), as_json, replay_table(made))


def replay_table(made: Replay) -> RenderableType:
    """A line for each pruner, and what the figures rest on."""
    columns = ("pruner", "at", "pruned", "epochs saved", "time saved", "winner", "best left", "regret")
    table = table_of(
        columns, [_cells(row, made.winner) for row in made.pruners], left=("pruner", "at", "winner"),
        title=f"study {made.study}: what each pruner would have saved",
    )  # fmt: skip
    won = f"winner: trial {made.winner}, validation {percent(made.winner_value)}"
    lines = [
        f"{made.trials} trials, {made.epochs:,} epochs, {duration(made.seconds)} of training; "
        + (won if made.winner is not None else "no complete trial yet"),
        "in brackets: the complete trials and the epoch before which nothing is pruned",
        "rows with published figures are never pruned for lagging",
    ]
    if made.cut_short:
        lines.append(
            f"{made.cut_short} of the {made.trials} had been cut short (lagging or diverged): they are "
            "replayed as far as they went; replay a search made with --no-pruning for a full answer"
        )
    return Group(table, *(escape(line) for line in lines))


def _cells(row: PrunerReplay, winner: int | None) -> list[str]:
    lost = "kept" if row.winner_pruned_at is None else f"lost at epoch {row.winner_pruned_at}"
    if winner is None:
        lost = "-"
    return [
        pruner_text(row.pruner), row.pruner.compare_at, str(row.trials_pruned),
        f"{row.epochs_saved:,} ({row.share_saved:.0%})", duration(row.seconds_saved), lost,
        percent(row.best_value), percent(row.regret),
    ]  # fmt: skip


def pruner_text(declared: PrunerSpec) -> str:
    """A pruner and when it may first act: "median (4 trials, epoch 10)"."""
    share = {"percentile": f" {declared.percentile:g}", "hyperband": f" / {declared.reduction_factor}"}
    text = declared.name + share.get(declared.name, "")
    if declared.name in ("median", "percentile"):
        trials = f"{declared.startup_trials} trial{'s' if declared.startup_trials > 1 else ''}"
        return f"{text} ({trials}, epoch {declared.warmup_epochs})"
    return text if declared.name == "none" else f"{text} (epoch {declared.warmup_epochs})"
