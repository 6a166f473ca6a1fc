"""`storage`: the study database copied, examined, upgraded."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from caltech_hpo.cli.options import DEFAULT_HOME, Home, Json, Storage, answer, place_of, progress_bars
from caltech_hpo.errors import StorageError

if TYPE_CHECKING:
    from caltech_hpo.search.maintenance import Examined

storage_app = typer.Typer(no_args_is_help=True, help="Back up, check and upgrade the study database.")


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.add_typer(storage_app, name="storage")


@storage_app.command()
def backup(
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="The copy.", show_default="HOME/backups/studies-TIME.db"),
    ] = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Copy the SQLite database by SQLite's own backup, also while a search runs; the copy is checked.

    Example: caltech-hpo storage backup studies-before-the-upgrade.db
    """
    from caltech_hpo.search.maintenance import backup as copy

    place = place_of(home, storage)
    target = target or place.backups / f"studies-{datetime.now(UTC):%Y%m%d-%H%M%S}.db"
    with progress_bars() as bars:
        size = copy(place.storage, target, progress=bars)
    answer(
        {"backup": str(target), "bytes": size},
        as_json,
        f"{target}: {size:,} bytes, checked; to restore it, stop what runs and copy it over the database",
    )


@storage_app.command()
def check(home: Home = DEFAULT_HOME, storage: Storage = None, as_json: Json = False) -> None:
    """Examine the database: SQLite's integrity check, Optuna's schema, studies, trials, test scores.

    Writes nothing. Exit code 4 if something is wrong.

    Example: caltech-hpo storage check
    """
    from caltech_hpo.search.maintenance import examine
    from caltech_hpo.search.urls import shown

    place = place_of(home, storage)
    with progress_bars() as bars:
        bars("checking the database", 0, 1)
        found = examine(place.storage)
        count, problem = _scores(place.storage, found)
    problems = [*found.problems, *([problem] if problem else [])]
    document = {"storage": shown(place.storage), "ok": not problems, **asdict(found), "test_scores": count}
    size = "" if found.size is None else f", {found.size:,} bytes"
    facts = (
        f"{shown(place.storage)}: {found.studies} studies, {found.trials} trials, {count} test scores{size}; "
        f"Optuna's schema {found.schema or 'unknown'}"
    )
    answer(
        document | {"problems": problems},
        as_json,
        "\n".join([facts, *problems] if problems else [facts, "ok"]),
    )
    if problems:
        raise typer.Exit(StorageError.exit_code)


def _scores(url: str, found: Examined) -> tuple[int, str]:
    """The number of test scores, and what is wrong with them."""
    from caltech_hpo.results.ledger import scores

    if found.problems:
        return 0, ""  # there are worse ones
    try:
        return len(scores(url)), ""
    except ValueError as error:
        return 0, f"test scores that cannot be read: {str(error).splitlines()[0]}"


@storage_app.command()
def upgrade(home: Home = DEFAULT_HOME, storage: Storage = None, as_json: Json = False) -> None:
    """Bring the tables of an older Optuna to the installed one's schema, after a backup (SQLite).

    Of a server's database make a backup yourself first. Refused while a command works on one of its studies.

    Example: caltech-hpo storage upgrade
    """
    from caltech_hpo.search.maintenance import upgrade as bring_up

    place = place_of(home, storage)
    with progress_bars() as bars:
        done = bring_up(place.storage, place.home, place.backups, progress=bars)
    kept = None if done.backup is None else str(done.backup)
    if done.before == done.after:
        text = f"Optuna's schema {done.after} is the newest: nothing to do"
    else:
        text = f"upgraded from {done.before} to {done.after}" + (f"; the backup is {kept}" if kept else "")
    answer({"before": done.before, "after": done.after, "backup": kept}, as_json, text)
