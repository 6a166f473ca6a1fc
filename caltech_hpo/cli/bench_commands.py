"""`bench`: how fast this machine trains and searches, beside the stock way and the floor."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from caltech_hpo.cli.bench_runs import (
    MODELS,
    ON_A_GPU,
    ROUNDS,
    ROUNDS_ON_A_GPU,
    SECONDS,
    SECONDS_ON_A_GPU,
    STUDY,
    STUDY_SECONDS,
    recipes,
    run_overhead,
    run_reporters,
    run_speed,
)
from caltech_hpo.cli.bench_tables import (
    machine,
    overhead_table,
    reports_table,
    rows_json,
    speed_table,
)
from caltech_hpo.cli.options import (
    DEFAULT_HOME,
    Data,
    Device,
    Home,
    Json,
    Skip,
    Storage,
    answer,
    goes_on,
    place_of,
    progress_bars,
)
from caltech_hpo.errors import CaltechHpoError, UsageError

LEAST_SECONDS = 10.0  # of --reporters
MOST_IMAGES = 65536  # as in spec, which --help need not import


class SamplerChoice(StrEnum):
    """For --sampler."""

    tpe = "tpe"
    random = "random"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(bench)


def bench(
    study: Annotated[
        str | None, typer.Option("--study", help="Measure this study's recipe, on its data, instead.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Architecture; may be repeated.", show_default=", ".join(MODELS)),
    ] = None,
    device: Device = "auto",
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=3600,
            help="How long each measurement takes, at least.",
            show_default=f"{SECONDS:.0f}, on a GPU {SECONDS_ON_A_GPU:.0f}",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measurements of each, in turns; the median counts.",
            show_default=f"{ROUNDS}, on a GPU {ROUNDS_ON_A_GPU}",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=MOST_IMAGES,
            help="Images a step.",
            show_default="the study's, or the most that stock can hold",
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            help=f"Also search {STUDY} for {STUDY_SECONDS:.0f} s with each of these, e.g. {ON_A_GPU}.",
            show_default=f"{ON_A_GPU} on a GPU without --study, else none",
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Measure what searching costs beside training, instead.")
    ] = False,
    trials: Annotated[int, typer.Option(min=1, help="How many trials --search makes up.")] = 1000,
    reporters: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Instead: a search by so many simulated workers that report once a second.",
            show_default="none",
        ),
    ] = None,
    sampler: Annotated[
        SamplerChoice, typer.Option(help="The sampler that --reporters searches with.")
    ] = SamplerChoice.tpe,
    skip_unreadable: Skip = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Measure training and evaluation: the stock way, ours, and the floor, in images per second.

    Stock: JPEG files in a DataLoader of 4 workers, fp32, NCHW. The floor: our step on one batch, again and
    again. Nothing is kept but the decoded images. --reporters writes a study into the database of
    --storage where that is a server's, and deletes it; else into a SQLite file of its own.

    Example: caltech-hpo bench --model alexnet --seconds 10
    """
    if sum([search, reporters is not None, bool(study or model or workers)]) > 1:
        options = "--search, --reporters and --study, --model, --workers measure different things"
        raise UsageError(options, "give one kind of them")
    place = place_of(home, storage, data)
    from caltech_hpo.search.bench_study import Measurements

    with goes_on(kept=False), progress_bars() as bars:
        if reporters is not None:
            held = run_reporters(place, reporters, max(seconds or 0.0, LEAST_SECONDS), sampler.value, bars)
            bars.close()
            answer(asdict(held), as_json, reports_table(held))
            return
        if search:
            measured = run_overhead(place, trials, bars)
            bars.close()
            answer(asdict(measured), as_json, overhead_table(measured))
            return
        found = Measurements()
        try:
            run_speed(
                found, study, place, recipes(study, model or [], workers), device, seconds, rounds,
                batch_size, workers, skip_unreadable, bars,
            )  # fmt: skip
        finally:  # minutes of measuring are not lost with what comes after them
            bars.close()
            if found.speeds:
                answer(rows_json(found), as_json, speed_table(found, machine()))
        if found.lacking:
            raise CaltechHpoError(
                f"not all could be measured: {', '.join(found.lacking)}",
                "what ended it is said above; for lack of memory: a smaller --batch-size, fewer --workers",
            )
