"""`studies`, `data`, `models`: what is declared and what is there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caltech_hpo.cli.options import (
    DEFAULT_HOME,
    Data,
    Home,
    Json,
    Storage,
    answer,
    goes_on,
    options_after,
    place_of,
    progress_bars,
    say,
)
from caltech_hpo.cli.tables import check_table, models_table, record_json, studies_table, study_text
from caltech_hpo.errors import DataError, UsageError, WeightsError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

    from caltech_hpo.spec import StudySpec

studies_app = typer.Typer(help="The declared studies.")
data_app = typer.Typer(no_args_is_help=True, help="Fetch and check images.")
models_app = typer.Typer(help="The architectures side by side.")


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for name, group in (("studies", studies_app), ("data", data_app), ("models", models_app)):
        app.add_typer(group, name=name)


def study_json(spec: StudySpec, stored: str, source: str, database: RDBStorage | None) -> dict[str, Any]:
    """What is declared of a study, and what the database holds under the name `stored`."""
    from caltech_hpo.search.records import best_record, finished_count, trial_records
    from caltech_hpo.search.storage import find_study
    from caltech_hpo.study_checks import warnings_of

    study = find_study(database, stored)
    records = trial_records(study) if study else []
    return {
        "study": stored, "file": source, "about": spec.about, "data": spec.data,
        "recipe": spec.recipe.model_dump(mode="json"),
        "space": {name: dimension.model_dump(mode="json") for name, dimension in spec.space.items()},
        "sampler": spec.sampler.model_dump(mode="json"), "pruner": spec.pruner.model_dump(mode="json"),
        "baselines": [row.model_dump(mode="json") for row in spec.baselines], "spec_hash": spec.hash,
        "trials": len(records), "finished": finished_count(records),
        "best": record_json(best_record(records)), "warnings": warnings_of(spec),
    }  # fmt: skip


@studies_app.callback(invoke_without_command=True)
def studies(
    context: typer.Context, home: Home = DEFAULT_HOME, storage: Storage = None, as_json: Json = False
) -> None:
    """List the studies, built-in and in ./studies, with their trials and best so far."""
    if context.invoked_subcommand:
        options_after(context)
        return
    from caltech_hpo.search.storage import open_existing, study_names
    from caltech_hpo.study_files import base_name, load_study, study_files

    database = open_existing(place_of(home, storage).storage)
    files = study_files()
    again = [name for name in study_names(database) if name not in files and base_name(name) in files]
    rows, faults = [], []
    for name in sorted([*files, *again]):
        try:
            spec = load_study(name)
        except UsageError as error:  # one faulty file must not hide the others
            faults.append(error)
        else:
            rows.append(study_json(spec, name, str(files.get(name) or files[base_name(name)]), database))
    answer(rows, as_json, studies_table(rows))
    without = [name for name in study_names(database) if base_name(name) not in files]
    if without:
        say(f"also in the database, their files are not here: {', '.join(without)}")
    for fault in faults:
        say(f"error: {fault}")
    if faults:
        raise typer.Exit(UsageError.exit_code)


@studies_app.command("show")
def studies_show(
    name: Annotated[str, typer.Argument(help="Study name.")],
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show a study: its comment, space, sampler, pruner, baselines, and what the database holds.

    Example: caltech-hpo studies show alexnet-scratch
    """
    from caltech_hpo.search.storage import open_existing
    from caltech_hpo.study_files import load_study, study_files

    spec = load_study(name)
    source = str(study_files()[spec.name])
    document = study_json(spec, name, source, open_existing(place_of(home, storage).storage))
    answer(document, as_json, study_text(document))


@data_app.command("fetch")
def data_fetch(
    archive: Annotated[
        Path | None, typer.Option(help="Use this caltech-101.zip (or its inner tar.gz).")
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Download Caltech-101 (137 MB) into the home and unpack it; goes on where a download stopped.

    Example: caltech-hpo data fetch --archive ~/Downloads/caltech-101.zip
    """
    from caltech_hpo.data.download import fetch_caltech101

    place = place_of(home, None)
    there = (place.datasets / "caltech101").is_dir()
    with goes_on(), progress_bars() as bars:
        folder = fetch_caltech101(place.datasets, archive=archive, progress=bars)
    answer({"folder": str(folder)}, as_json, f"Caltech-101 {'was already' if there else 'is'} in {folder}")


@data_app.command("check")
def data_check(home: Home = DEFAULT_HOME, data: Data = None, as_json: Json = False) -> None:
    """Count classes and images, find unreadable files and images that are in two splits.

    Exit code 3 for unreadable files and for leaks: test images whose pixels are in training or validation
    too. Without --data: the home's Caltech-101.

    Example: caltech-hpo data check --data my-images
    """
    from caltech_hpo.data.check import check
    from caltech_hpo.data.dataset import scan

    folder = data or place_of(home, None).datasets / "caltech101"
    if data is None and not folder.is_dir():
        raise DataError(f"no data in {folder}", "give --data DIR, or run 'caltech-hpo data fetch'")
    with progress_bars() as bars:
        result = check(scan(folder), progress=bars)
    document = {**asdict(result), "root": str(result.root)}
    answer(document, as_json, check_table(result))
    if result.has_faults:
        say("error: the data has faults, listed above")
        raise typer.Exit(3)


@models_app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    crop: Annotated[int, typer.Option(min=32, max=2048, help="Input side in pixels.")] = 224,
    classes: Annotated[int, typer.Option(min=2, help="Outputs of the new head.")] = 101,
    study: Annotated[str | None, typer.Option("--study", help="Take the crop from this study.")] = None,
    as_json: Json = False,
) -> None:
    """Compare the architectures: layers, parameters, FLOPs, activation memory per image."""
    if context.invoked_subcommand:
        options_after(context)
        return
    from caltech_hpo.search.request import with_own_sizes
    from caltech_hpo.study_files import load_study
    from caltech_hpo.terms import DEFAULT_SMALLEST_CROP, SMALLEST_CROP
    from caltech_hpo.training.architectures import ARCHITECTURES
    from caltech_hpo.training.summary import summarize

    crop = with_own_sizes(load_study(study)).recipe.crop if study else crop
    fitting = [name for name in ARCHITECTURES if crop >= SMALLEST_CROP.get(name, DEFAULT_SMALLEST_CROP)]
    rows = []
    for name in fitting:
        try:
            rows.append(summarize(name, crop=crop, classes=classes))
        except WeightsError as error:  # comes from a package that is not installed
            say(f"{name} left out: {error.message}; {error.fix}")
    answer([asdict(row) for row in rows], as_json, models_table(rows))


@models_app.command("show")
def models_show(
    name: Annotated[str, typer.Argument(help="Architecture.")],
    crop: Annotated[
        int | None,
        typer.Option(min=32, max=2048, help="Input side in pixels.", show_default="224, or timm's own"),
    ] = None,
    classes: Annotated[int, typer.Option(min=2, help="Outputs of the new head.")] = 101,
    as_json: Json = False,
) -> None:
    """Print the structure of an architecture.

    Example: caltech-hpo models show resnet18
    """
    from caltech_hpo.terms import TIMM
    from caltech_hpo.training.summary import meta_model, require_architecture, summarize
    from caltech_hpo.training.timm_models import timm_sizes

    require_architecture(name)
    if crop is None:
        crop = timm_sizes(name)[1] if name.startswith(TIMM) else 224
    structure = str(meta_model(name, classes))
    document = {**asdict(summarize(name, crop=crop, classes=classes)), "structure": structure}
    answer(document, as_json, structure)
