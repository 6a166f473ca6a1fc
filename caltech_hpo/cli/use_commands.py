"""`predict`, `export`, `errors`: what a trained model is good for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.markup import escape

from caltech_hpo.cli.display import percent
from caltech_hpo.cli.options import (
    DEFAULT_HOME,
    Data,
    Device,
    Home,
    Json,
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
from caltech_hpo.errors import DataError, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from caltech_hpo.results.mistakes import Mistakes
    from caltech_hpo.results.predict import Prediction

Model = Annotated[
    Path | None,
    typer.Option("--model", help="A .safetensors file of caltech-hpo's, in place of the study's model."),
]
SHOWN = 10


class FormatChoice(StrEnum):
    """For --format."""

    onnx = "onnx"
    torch_export = "torch-export"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (predict, export, errors):
        app.command()(command)


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    study: Annotated[str | None, typer.Option("--study", help="Use this study's model.")] = None,
    model: Model = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
    device: Device = "auto",
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Say what images show: the likeliest classes with their probabilities.

    The model is the one that 'final' trained of the study's winner; before that, the best trial's.
    Files that cannot be read are named, the others are predicted, and the exit code is 3.

    Example: caltech-hpo predict photo.jpg more-photos/ --study lite0-transfer
    """
    from caltech_hpo.results.predict import find_model, image_files
    from caltech_hpo.results.predict import predict as predicted

    files = image_files(images)
    chosen = find_model(study, place_of(home, storage), model)
    say(f"model: {chosen.words}")
    with goes_on(kept=False), progress_bars() as bars:
        made = list(predicted(chosen.model, files, device=device, top=top, progress=bars))
    document = {
        "model": str(chosen.model.weights),
        "images": [one.model_dump(mode="json") for one in made],
    }
    problems = [one for one in made if one.problem]
    if as_json or len(problems) < len(made):
        answer(document, as_json, _predictions(made))
    if problems:
        lines = "".join(f"\n  {one.file}: {one.problem}" for one in problems[:SHOWN])
        raise DataError(f"{len(problems)} file(s) could not be read:{lines}", "replace them")


def _predictions(made: Sequence[Prediction]) -> Group:
    columns = ["image", "class", "probability", "then"]
    rows = [
        [
            one.file, one.classes[0], percent(one.probabilities[0]),
            ", ".join(
                f"{name} {percent(share)}"
                for name, share in zip(one.classes[1:], one.probabilities[1:], strict=True)
            ),
        ]
        for one in made if not one.problem
    ]  # fmt: skip
    return Group(table_of(columns, rows, left=("image", "class", "then")))


def export(
    study: Annotated[str | None, typer.Option("--study", help="Use this study's model.")] = None,
    model: Model = None,
    kind: Annotated[FormatChoice, typer.Option("--format", help="What to write.")] = FormatChoice.onnx,
    output: Annotated[
        Path | None, typer.Option(help="The file.", show_default="STUDY.onnx or STUDY.pt2 here")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write the model as one file for other programs, and check that it gives the same answers.

    Input: images (n, 3, crop, crop), float32, RGB from 0 to 1; the normalisation is inside. Output:
    logits (n, classes). Classes and preprocessing stand in the file's metadata.

    Example: caltech-hpo export --study lite0-transfer --format onnx
    """
    from caltech_hpo.results.export import SUFFIXES
    from caltech_hpo.results.export import export as exported
    from caltech_hpo.results.predict import find_model

    chosen = find_model(study, place_of(home, storage), model)
    file = output or Path(f"{study or chosen.model.weights.stem}{SUFFIXES[kind.value]}")
    if file.exists() and not force:
        raise UsageError(f"{file}: is there already", "give another --output, or write over it with --force")
    say(f"model: {chosen.words}; writing {file}, which takes a few seconds")
    with goes_on(kept=False):
        try:
            made = exported(chosen.model, kind.value, file)
        except OSError as error:
            raise StorageError(
                f"{file}: {error.strerror}", "give a file that can be written: --output"
            ) from error
    scaling = made.description["preprocessing"]
    size = f"short side {scaling['resize_short_side']}, centre crop {scaling['center_crop']}"
    answer(
        {
            "file": str(made.file), "format": made.format, "checked_images": made.images,
            "largest_difference": made.largest_difference, **made.description,
        },
        as_json,
        f"{made.file}: {made.file.stat().st_size / 2**20:.1f} MiB, "
        f"{len(chosen.model.classes)} classes; {size}, RGB from 0 to 1\n"
        f"the same answers on {made.images} test patterns (logits differ by at most "
        f"{made.largest_difference:.1e})",
    )  # fmt: skip


def errors(
    study: Study,
    model: Model = None,
    most: Annotated[int, typer.Option(min=1, max=1000, help="Pictures on the page.")] = 50,
    output: Annotated[
        Path | None, typer.Option(help="The page.", show_default="reports/STUDY/errors.html in the home")
    ] = None,
    device: Device = "auto",
    skip_unreadable: Skip = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show what the model gets wrong on the validation images: a page with pictures, and tables.

    The surest mistakes, the classes confused most, the accuracy of each class. The test images are not
    looked at: who mends mistakes on them has no test set left.

    Example: caltech-hpo errors --study lite0-transfer
    """
    from caltech_hpo.results.mistakes import find_mistakes, write_mistakes
    from caltech_hpo.results.predict import find_model

    place = place_of(home, storage, data)
    chosen = find_model(study, place, model, held_out=True)
    say(f"model: {chosen.words}")
    with goes_on(kept=False), progress_bars() as bars:
        found = find_mistakes(
            study, place, chosen, device=device, most=most, skip_unreadable=skip_unreadable,
            progress=bars, say=say,
        )  # fmt: skip
    page = output or place.home / "reports" / study / "errors.html"
    try:
        write_mistakes(found, page)
    except OSError as error:
        raise StorageError(
            f"{page}: {error.strerror}", "give a file that can be written: --output"
        ) from error
    document = {**found.mistakes.model_dump(mode="json"), "page": str(page)}
    answer(document, as_json, _mistakes(found.mistakes, page))


def _mistakes(made: Mistakes, page: Path) -> Group:
    surest = table_of(
        ["surest mistakes", "is", "taken for", "probability"],
        [[one.file, one.truth, one.predicted, percent(one.probability)] for one in made.surest[:SHOWN]],
        left=("surest mistakes", "is", "taken for"),
    )
    confused = table_of(
        ["confused most", "taken for", "images"],
        [[one.truth, one.predicted, f"{one.count} of {one.images}"] for one in made.confused[:SHOWN]],
        left=("confused most", "taken for"),
    )
    worst = table_of(
        ["least accurate", "images", "accuracy"],
        [[one.name, str(one.images), percent(one.accuracy)] for one in made.classes[:SHOWN]],
        left=("least accurate",),
    )
    line = (
        f"{made.images:,} validation images: top-1 {made.top1:.4f}, mean per class {made.mean_per_class:.4f}"
    )
    return Group(surest, confused, worst, line, escape(f"page: {page}"))
