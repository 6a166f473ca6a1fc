"""A study database as a whole: copied, examined, brought to the installed Optuna's schema."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from caltech_hpo.data.cache import sync_folder
from caltech_hpo.errors import StorageError
from caltech_hpo.search.locks import all_locks, serve_lock
from caltech_hpo.search.records import RECIPE_KEY, trial_record
from caltech_hpo.search.sqlite_file import reading
from caltech_hpo.search.storage import BUSY_TIMEOUT, check_sqlite, open_any_schema
from caltech_hpo.search.urls import shown, sqlite_path

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

PAGES = 4096  # copied between two progress messages
MOST_PROBLEMS = 20
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Examined:
    """What a check found. `schema` is Optuna's, `newest` the installed Optuna's own; `size` in bytes, of a
    file. Without `problems` the database is whole."""

    schema: str
    newest: str
    studies: int
    trials: int
    size: int | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Upgraded:
    """The schema before and after; `backup` is where the database was copied to, None where nothing was done
    or the database is a server's."""

    before: str
    after: str
    backup: Path | None


def backup(url: str, target: Path, *, progress: Progress | None = None) -> int:
    """Copies a SQLite database, also while a search writes to it; returns the copy's bytes.

    By SQLite's own backup, in one read transaction; the copy takes its name once it is whole and examined.
    Raises StorageError for a server's database, a target that exists, and a copy that is not whole.
    """
    path = _file(url, "back up")
    if target.exists():
        raise StorageError(f"{target}: is there already", "give a backup a name of its own")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(path, temporary, progress)
        problems = _sqlite_problems(temporary)
        if problems:
            raise StorageError(
                f"{path}: the copy is damaged: {problems[0]}", "run 'caltech-hpo storage check'"
            )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"{target}: no backup: {error}", "make room, or name another file") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target.stat().st_size


def _file(url: str, verb: str) -> Path:
    path = sqlite_path(url)
    if path is None:
        raise StorageError(
            f"{shown(url)}: cannot {verb} a server's database", "use the server's own tools: pg_dump"
        )
    if not check_sqlite(path):
        raise StorageError(f"{path}: holds no studies", "check --home and --storage")
    return path


def _copy(path: Path, target: Path, progress: Progress | None) -> None:
    def copied(_: int, remaining: int, total: int) -> None:
        if progress:
            progress("copying the database: pages", total - remaining, total)

    with reading(path, BUSY_TIMEOUT) as source, contextlib.closing(sqlite3.connect(target)) as copy:
        # In a read transaction: else every write to the source would begin the copy anew.
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_master").fetchone()
        source.backup(copy, pages=PAGES, progress=copied)
        copy.execute("PRAGMA journal_mode=delete")  # one file, whatever the source's mode


def _sqlite_problems(path: Path) -> list[str]:
    """What SQLite itself finds wrong."""
    try:
        with reading(path, BUSY_TIMEOUT) as connection:
            found = [row[0] for row in connection.execute(f"PRAGMA integrity_check({MOST_PROBLEMS})")]
            foreign = connection.execute("PRAGMA foreign_key_check").fetchmany(MOST_PROBLEMS)
    except sqlite3.DatabaseError as error:
        return [str(error)]
    lost = [
        f"{table}: row {row} belongs to a row of {parent} that is not there"
        for table, row, parent, _ in foreign
    ]
    return [problem for problem in found if problem != "ok"] + lost


def examine(url: str) -> Examined:
    """Examines the file (SQLite's integrity and foreign keys), the schema and the studies. Writes nothing.

    Raises StorageError for what is no study database at all.
    """
    path = sqlite_path(url)
    if path is not None:
        length = path.stat().st_size if path.is_file() else 0
        problems = _sqlite_problems(path) if length else []
        if problems:
            return Examined("", "", 0, 0, length, tuple(problems))
        _file(url, "check")
    storage = open_any_schema(url)
    current, newest = storage.get_current_version(), storage.get_head_version()
    size = None if path is None else path.stat().st_size
    if current != newest:
        problem = f"Optuna's schema is {current}, the installed Optuna's {newest}"
        return Examined(current, newest, 0, 0, size, (problem,))
    trials, problems = _study_problems(storage)
    return Examined(current, newest, len(storage.get_all_studies()), trials, size, tuple(problems))


def _study_problems(storage: RDBStorage) -> tuple[int, list[str]]:
    """How many trials there are, and what cannot be read or does not fit together."""
    total, problems = 0, []
    for study in storage.get_all_studies():
        try:
            trials = storage.get_all_trials(study._study_id, deepcopy=False)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"study {study.study_name}: cannot be read: {str(error).splitlines()[0]}")
            continue
        total += len(trials)
        if [trial.number for trial in trials] != list(range(len(trials))):
            problems.append(f"study {study.study_name}: its trials are not numbered from 0 without gaps")
        for trial in trials:
            problem = _trial_problem(trial)
            if problem:
                problems.append(f"study {study.study_name}, trial {trial.number}: {problem}")
    return total, problems[:MOST_PROBLEMS]


def _trial_problem(trial: FrozenTrial) -> str:
    if RECIPE_KEY not in trial.system_attrs:
        return ""  # another program's
    try:
        record = trial_record(trial)
    except (ValueError, TypeError, KeyError) as error:  # pydantic's errors are ValueErrors
        return f"cannot be read: {str(error).splitlines()[0]}"
    epochs = [result.epoch for result in record.epochs]
    if epochs != list(range(1, len(epochs) + 1)):
        return f"epochs are missing: it has {epochs}"
    if record.state == "complete" and record.value is not None and trial.value != record.value:
        return f"its value {trial.value} is not the best of its epochs, {record.value}"
    return ""


def _names(storage: RDBStorage) -> list[str]:
    """The studies' names, by a query that every schema answers."""
    from sqlalchemy import text

    with storage.engine.connect() as connection:
        return list(connection.scalars(text("SELECT study_name FROM studies")))


def upgrade(url: str, home: Path, backups: Path, *, progress: Progress | None = None) -> Upgraded:
    """Brings the tables to the installed Optuna's schema, by Optuna's own migrations, after a backup.

    Nothing is done where the schema is the newest. Raises StorageError while a search runs on the database,
    and for a schema that is newer than the installed Optuna's.
    """
    storage = open_any_schema(url)
    before, newest = storage.get_current_version(), storage.get_head_version()
    if before == newest:
        return Upgraded(before, newest, None)
    if before not in storage.get_all_versions():
        raise StorageError(
            f"{shown(url)}: its schema {before} is newer than this Optuna's", "pip install --upgrade optuna"
        )
    with contextlib.ExitStack() as locks:
        locks.enter_context(all_locks(url, home, *sorted(_names(storage))))
        locks.enter_context(serve_lock(url, home))
        copy = None
        if sqlite_path(url) is not None:
            copy = backups / f"before-{newest}-{datetime.now(UTC):%Y%m%d-%H%M%S}.db"
            backup(url, copy, progress=progress)
        storage.upgrade()
    return Upgraded(before, storage.get_current_version(), copy)
