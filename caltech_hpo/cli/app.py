"""The typer application and its commands."""

from __future__ import annotations

import typer

from caltech_hpo import __version__
from caltech_hpo.cli import (
    bench_commands,
    confirm_commands,
    dashboard_commands,
    init_commands,
    inspect_commands,
    plan_commands,
    queue_commands,
    replay_commands,
    result_commands,
    search_commands,
    storage_commands,
    use_commands,
)

app = typer.Typer(
    name="caltech-hpo", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Searches hyperparameters of image classifiers, shows the trials, and tests the best one, once.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
for commands in (
    init_commands, plan_commands, search_commands, confirm_commands, result_commands, dashboard_commands,
    replay_commands, use_commands, queue_commands, bench_commands, inspect_commands, storage_commands,
):  # fmt: skip
    commands.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Searches hyperparameters of image classifiers, shows the trials, and tests the best one, once."""
