"""What `bench` measures, by its options."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from caltech_hpo.cli.bench_tables import speed_line
from caltech_hpo.cli.options import say
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
            if row.rounds < rounds or None in (row.stock, row.ours, row.floor):
                measured.lacking.append(f"{row.model} {row.phase}")
    measured.cache = measure_cache(index, values[0].resize, place.cache, bars)
    place = replace(place, data=index.root)  # found once: the studies have homes of their own
    for count in counts:
        request = SearchRequest(
            STUDY, TRIALS, workers=count, device=device, baselines=False, skip_unreadable=skip_unreadable,
            spec=of_one_batch_size(STUDY),
        )  # fmt: skip
        try:
            searched = measure_study(request, place, seconds=STUDY_SECONDS, progress=bars)
            measured.studies.append(searched)
            if not searched.epochs:
                measured.lacking.append(f"{STUDY} with --workers {count}")
        except (CaltechHpoError, RuntimeError) as error:  # the other numbers are measured all the same
            say(f"{STUDY} with --workers {count}: {error}")
            measured.lacking.append(f"{STUDY} with --workers {count}")


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
