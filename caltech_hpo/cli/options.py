"""What the commands share: options, where to print, how to answer."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from caltech_hpo.cli import INTERRUPTED, TERMINATED
from caltech_hpo.cli.display import ProgressBars
from caltech_hpo.errors import UsageError

if TYPE_CHECKING:
    from caltech_hpo.search.request import Place

Home = Annotated[
    Path, typer.Option("--home", envvar="CALTECH_HPO_HOME", help="Folder for everything that is kept.")
]


def _storage_url(context: typer.Context, value: str | None) -> str | None:
    """Refuses a password that other users of the machine could read."""
    source = context.get_parameter_source("storage")
    if value and source is not None and source.name == "COMMANDLINE":
        from caltech_hpo.search.urls import refuse_password

        refuse_password(value)
    return value


Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="CALTECH_HPO_STORAGE",
        help="Study database URL; one with a password belongs into the environment variable.",
        callback=_storage_url,
        show_default="SQLite in the home",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", envvar="CALTECH_HPO_DATA", help="Folder of images, one sub-folder for each class."
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory",
        min=0.05,
        help="GiB that all workers may train in together; each takes 0.4 beside.",
        show_default="most of what is free",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else there.")]
Study = Annotated[str, typer.Option("--study", help="Study name; 'caltech-hpo studies' lists them.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:K or mps.")]
Skip = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be decoded.")]
DEFAULT_HOME = Path("storage")
PIPE_WIDTH = 140
# One for messages, bars and tables: only so does rich draw bars anew below a message.
STDERR = Console(stderr=True)


def place_of(home: Path, storage: str | None, data: Path | None = None) -> Place:
    """Where this call keeps and finds things."""
    from caltech_hpo.search.request import Place
    from caltech_hpo.search.urls import default_url

    return Place(home, storage or default_url(home), data)


def say(text: str) -> None:
    """One plain line on stderr; square brackets in it are text."""
    STDERR.print(text, markup=False, highlight=False, soft_wrap=True)


def answer(document: Any, as_json: bool, human: RenderableType) -> None:
    """Prints the JSON document, or what a person wants to read, on stdout."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    elif isinstance(human, str):
        Console().print(human, markup=False, highlight=False, soft_wrap=True)
    else:
        # A pipe or a file has no width: do not squeeze tables into Rich's default of 80 columns.
        free = not sys.stdout.isatty() and "COLUMNS" not in os.environ
        Console(width=PIPE_WIDTH if free else None).print(human, highlight=False)


def options_after(context: typer.Context) -> None:
    """Refuses options that a group would swallow before its sub-command. Raises UsageError."""
    sources = [context.get_parameter_source(name) for name in context.params]
    if any(source is not None and source.name == "COMMANDLINE" for source in sources):
        raise UsageError(
            f"options before '{context.invoked_subcommand}' have no effect",
            f"write them behind: caltech-hpo {context.info_name} {context.invoked_subcommand} ... --OPTION",
        )


def this_command() -> str:
    """The command as it was typed; no password stands in it."""
    name = Path(sys.argv[0]).name
    return shlex.join(["caltech-hpo" if name == "__main__.py" else name, *sys.argv[1:]])


def as_given(*options: str) -> str:
    """Those of the options that this command was given, to end a command that may be typed next."""
    words: list[str] = []
    for word, following in pairwise([*sys.argv[1:], ""]):
        name, joined, value = word.partition("=")
        if name in options:
            words += [name, value if joined else following]
    return "".join(f" {shlex.quote(word)}" for word in words)


@contextmanager
def goes_on(*, kept: bool = True) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command, with 130 or 143, and it says how to continue (typer would not).

    `kept` says whether the next call goes on, or begins anew.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else error.code
        if code not in (INTERRUPTED, TERMINATED):
            raise
        what = "the same command goes on from here" if kept else "to begin anew"
        say(f"{'interrupted' if code == INTERRUPTED else 'ended'}; {what}: {this_command()}")
        raise typer.Exit(code) from None


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    """Progress bars on stderr, gone afterwards."""
    bars = ProgressBars(STDERR)
    try:
        yield bars
    finally:
        bars.close()
