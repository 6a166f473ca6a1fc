"""`bench`: how fast this machine trains and searches, beside the stock way and the floor."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caltech_hpo.cli.bench_tables import (
    machine,
    overhead_table,
    reports_table,
    rows_json,
    speed_line,
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
    say,
)
from caltech_hpo.errors import CaltechHpoError, UsageError

if TYPE_CHECKING:
    from caltech_hpo.cli.display import ProgressBars
    from caltech_hpo.search.bench_study import Measurements
    from caltech_hpo.search.request import Place
    from caltech_hpo.spec import Hyperparameters

MODELS = ("alexnet", "resnet18", "vgg16")
# What the study is for whose wall time --workers measures, and how many trials it has.
STUDY, TRIALS = "alexnet-scratch", 40
ON_A_GPU = "1,2,4"
STUDY_SECONDS = 15.0
# On a GPU starting stock's loader takes as long as a measurement: all of it is to end within 8 minutes.
ROUNDS, ROUNDS_ON_A_GPU = 3, 2
SECONDS, SECONDS_ON_A_GPU = 3.0, 1.0  # a GPU takes a hundred steps in one

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


def recipes(study: str | None, models: list[str], workers: str | None) -> list[Hyperparameters]:
    """What is measured: the study's recipe, or stock values of each architecture. Raises UsageError."""
    from caltech_hpo.search.request import with_own_sizes
    from caltech_hpo.spec import Hyperparameters
    from caltech_hpo.study_files import load_study
    from caltech_hpo.training.summary import require_architecture

    if study is not None:
        if models:
            raise UsageError(
                "--study and --model together", "a study has a model of its own: give one of the two"
            )
        if workers is not None:
            raise UsageError(
                f"--workers and --study together: what --workers measures is {STUDY}, on its data",
                "give one of the two",
            )
        return [with_own_sizes(load_study(study)).recipe]
    for name in models:
        require_architecture(name)
    return [Hyperparameters(architecture=name) for name in models or MODELS]


def run_overhead(place: Place, trials: int, bars: ProgressBars) -> Any:
    """What searching costs."""
    from caltech_hpo.search.overhead import measure_overhead

    return measure_overhead(place.cache, trials, lambda done, total: bars("made-up trials", done, total))


def run_reporters(place: Place, workers: int, seconds: float, sampler: str, bars: ProgressBars) -> Any:
    """What one supervisor holds."""
    from caltech_hpo.search.reporters import measure_reports
    from caltech_hpo.search.urls import sqlite_path

    url = place.storage if sqlite_path(place.storage) is None else None
    return measure_reports(url, place.cache, workers, seconds, sampler, bars)


def run_speed(
    measured: Measurements, study: str | None, place: Place, values: list[Hyperparameters], device: str,
    seconds: float | None, rounds: int | None, batch_size: int | None, workers: str | None,
    skip_unreadable: bool, bars: ProgressBars,
) -> None:  # fmt: skip
    """Adds the rows of each recipe, of decoding, and of each number of workers; on the images of `study`."""
    from caltech_hpo.data.dataset import scan
    from caltech_hpo.data.loading import load_search_data
    from caltech_hpo.search.bench import bench_recipe, fitting_batch_size, measure_speed
    from caltech_hpo.search.bench_study import measure_cache, measure_study, of_one_batch_size
    from caltech_hpo.search.request import SearchRequest
    from caltech_hpo.search.run import locate_data
    from caltech_hpo.study_files import load_study
    from caltech_hpo.training.device import describe_device, resolve_device

    found_device = resolve_device(device)
    device, on_gpu = str(found_device), found_device.type == "cuda"
    usual = ON_A_GPU if on_gpu and study is None else ""
    counts = worker_counts(workers if workers is not None else usual)
    index = scan(locate_data(load_study(study or STUDY), place, progress=bars, say=say))
    rounds = rounds or (ROUNDS_ON_A_GPU if on_gpu else ROUNDS)
    seconds = seconds or (SECONDS_ON_A_GPU if on_gpu else SECONDS)
    for recipe in values:
        found = load_search_data(
            index, recipe.resize, place.cache, skip_unreadable=skip_unreadable, progress=bars
        )
        usual_size = recipe.batch_size if study else None
        size = batch_size or usual_size or fitting_batch_size(recipe.architecture, recipe.crop, device)
        made = bench_recipe(recipe.model_copy(update={"batch_size": size}), found)
        for row in measure_speed(
            made, device, found, index, seconds=seconds, rounds=rounds, progress=bars, say=say
        ):
            measured.speeds.append(replace(row, device=describe_device(found_device)))
            say(speed_line(measured.speeds[-1]))
    measured.cache = measure_cache(index, values[0].resize, place.cache, bars)
    place = replace(place, data=index.root)  # found once: the studies have homes of their own
    for count in counts:
        request = SearchRequest(
            STUDY, TRIALS, workers=count, device=device, baselines=False, skip_unreadable=skip_unreadable,
            spec=of_one_batch_size(STUDY),
        )  # fmt: skip
        try:
            measured.studies.append(measure_study(request, place, seconds=STUDY_SECONDS, progress=bars))
        except (CaltechHpoError, RuntimeError) as error:  # the other numbers are measured all the same
            say(f"{STUDY} with --workers {count}: {error}")


def worker_counts(text: str) -> list[int]:
    """ "1,2,4" to [1, 2, 4]. Raises UsageError."""
    try:
        counts = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        counts = [0]
    if any(count < 1 for count in counts):
        raise UsageError(
            f"--workers {text}: not whole numbers above 0", f"write for example --workers {ON_A_GPU}"
        )
    return counts
