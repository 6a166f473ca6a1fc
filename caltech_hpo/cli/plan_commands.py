"""`plan`: what a study will cost on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from caltech_hpo.cli.display import duration
from caltech_hpo.cli.options import (
    DEFAULT_HOME,
    Data,
    Device,
    Home,
    Json,
    Memory,
    Skip,
    Storage,
    Study,
    answer,
    goes_on,
    place_of,
    progress_bars,
    say,
)
from caltech_hpo.cli.tables import table_of
from caltech_hpo.units import bytes_of, size

if TYPE_CHECKING:
    from caltech_hpo.search.forecast import Forecast
    from caltech_hpo.search.planning import Plan
    from caltech_hpo.timings import StepTime

UNEVEN = 1.5  # steps whose middle one takes so many times as long as the shortest


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(plan)


def plan(
    study: Study,
    trials: Annotated[
        int, typer.Option(min=1, help="Finished trials that the study shall have in all.")
    ] = 40,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that train at once.")] = 1,
    device: Device = "auto",
    memory: Memory = None,
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Without the hand-tuned rows.")
    ] = False,
    no_pruning: Annotated[bool, typer.Option("--no-pruning", help="As if no trial were pruned.")] = False,
    skip_unreadable: Skip = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Foretell what a search will cost in time, memory and disk, from a few steps timed here.

    What pruning saves is learnt from the study's own trials, and assumed where there are none.

    Example: caltech-hpo plan --study alexnet-scratch --trials 40
    """
    from caltech_hpo.search.planning import make_plan
    from caltech_hpo.search.request import SearchRequest

    request = SearchRequest(
        study, trials, workers=workers, device=device, baselines=not no_baselines, pruning=not no_pruning,
        skip_unreadable=skip_unreadable, memory=bytes_of(memory),
    )  # fmt: skip
    with goes_on(kept=False), progress_bars() as bars:
        made = make_plan(request, place_of(home, storage, data), progress=bars, say=say)
    answer(plan_json(made), as_json, plan_text(made))


def forecast_line(found: Forecast) -> str:
    """ "34 trials in about 2 h 10 min (80%: 95 min to 2 h 40 min), half of them pruned"."""
    trials = f"{found.history} trial{'' if found.history == 1 else 's'}"
    source = f"guessed from {trials} of its own" if found.history else "assumed, there is no history"
    counted = f"{found.trials} trial{'' if found.trials == 1 else 's'}"
    return (
        f"{counted} in about {duration(found.seconds)} (80% likely: {duration(found.low)} to "
        f"{duration(found.high)}); {found.epochs:.0f} epochs a trial, {found.pruned:.0%} of them pruned "
        f"({source})"
    )


def plan_json(made: Plan) -> dict[str, Any]:
    """The plan; seconds and bytes; None for what was not looked at where no trial is to come."""
    looked = bool(made.timed)
    return {
        "study": made.study, "trials": made.trials, "finished": made.finished,
        "workers": made.workers or None, "device": made.device or None,
        "remaining": made.forecast.trials, "seconds": made.forecast.seconds,
        "seconds_low": made.forecast.low, "seconds_high": made.forecast.high, "start_seconds": made.start,
        "epochs_a_trial": made.forecast.epochs, "pruned": made.forecast.pruned,
        "history_trials": made.forecast.history,
        "kinds": [
            {**time.kind.model_dump(), "epoch_seconds": epoch, "setup_seconds": time.setup,
             "memory": time.memory, "micro_batch": time.micro_batch, "spread": time.spread}
            for time, epoch in zip(made.timed, made.epoch_seconds, strict=True)
        ],
        "untimed_kinds": made.untimed,
        "memory": made.memory if looked else None,
        "disk": {
            "pixels": made.pixels, "features": made.features, "weights": made.weights,
            "checkpoints": made.checkpoints,
        } if looked else None,
    }  # fmt: skip


def plan_text(made: Plan) -> Group | str:
    """The plan for people."""
    if not made.timed:
        return f"no trials to come: {made.finished} are finished already (asked: {made.trials})"
    rows = [
        [time.kind.freeze, str(time.kind.frozen_blocks), _batch(time),
         f"{time.kind.views} an image" if time.kept else "-", f"{epoch:.1f} s", f"{time.setup:.1f} s",
         size(time.memory)]
        for time, epoch in zip(made.timed, made.epoch_seconds, strict=True)
    ]  # fmt: skip
    columns = ("freeze", "frozen blocks", "batch", "features", "epoch", "before a trial", "memory, estimated")
    notes = []
    if made.untimed:
        of = f"{made.untimed} of {made.untimed + len(rows)} kinds of training"
        notes.append(f"not timed, and taken for the nearest that was: {of}")
    if max(time.spread for time in made.timed) > UNEVEN:
        notes.append("the timed steps differ much: do other programs run? The range is wider for it")
    workers = f"{made.workers} workers take" if made.workers > 1 else "a worker takes"
    return Group(
        table_of(columns, rows, left=("freeze",), title=f"study {made.study} on {made.device}"),
        *notes,
        forecast_line(made.forecast),
        f"memory: {workers} {size(made.memory)} at most, as in these steps",
        f"disk: decoded images {size(made.pixels)}, features {size(made.features)}, the best trial's weights "
        f"{size(made.weights)}; while it runs up to {size(made.checkpoints)} of checkpoints",
    )


def _batch(time: StepTime) -> str:
    pieces = f", {time.micro_batch} at a time" if time.micro_batch else ""
    return f"{time.kind.batch_size}{pieces}"
