"""SQLite as a study database: how transactions begin, and what a busy or a full file says."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import Any

from sqlalchemy import Connection, Engine, ExceptionContext, event

# Before this version, write-ahead logging has a known bug that can corrupt a database.
WAL_SAFE = (3, 51, 3)
WRITES = "caltech_hpo_writes"


def prepare_sqlite(engine: Engine) -> None:
    """Transactions begin when they are begun, as SQLAlchemy's documentation advises for sqlite3.

    Python's sqlite3 begins them itself, before the first write only: what was read before may be old by
    then, and the transaction fails instead of waiting.
    """
    event.listen(engine, "connect", _connected)
    event.listen(engine, "begin", _begun)
    event.listen(engine, "handle_error", _failed)
    engine.dispose()  # connections from before


def writing(engine: Engine) -> Engine:
    """The same database; transactions wait for their turn to write when they begin (BEGIN IMMEDIATE)."""
    return engine.execution_options(**{WRITES: True})


def use_safe_journal(engine: Engine) -> None:
    """Write-ahead logging where SQLite has it without the bug, else the rollback journal. It stays."""
    if engine.dialect.name != "sqlite":
        return
    wanted = "wal" if sqlite3.sqlite_version_info >= WAL_SAFE else "delete"
    connection: Any = engine.raw_connection()
    with contextlib.closing(connection), contextlib.suppress(sqlite3.OperationalError):  # others use it
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        if mode != wanted:
            connection.execute(f"PRAGMA journal_mode={wanted}")


def _connected(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # sqlite3 begins nothing by itself


def _begun(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _failed(context: ExceptionContext) -> None:
    """SQLite's errors do not say of which file they speak."""
    error, url = context.original_exception, context.engine.url if context.engine else None
    if isinstance(error, sqlite3.Error) and url is not None and str(url.database) not in str(error):
        error.args = (f"{url.database}: {error}",)


def is_busy(error: BaseException) -> bool:
    """Whether another program holds the file."""
    return "database is locked" in str(error) or "database table is locked" in str(error)


def is_full(error: BaseException) -> bool:
    """Whether there is no room for what is to be written."""
    return "database or disk is full" in str(error) or "disk I/O error" in str(error)
