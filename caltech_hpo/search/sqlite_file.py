"""A SQLite file of ours, read without changing what it holds."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def reading(path: Path, timeout: float) -> Iterator[sqlite3.Connection]:
    """A connection that changes nothing; a missing file is not made (OperationalError). It waits `timeout`
    seconds for who writes.

    It may write all the same: a process that was killed in the midst of a commit left a journal, which the
    next connection must roll back before anything can be read. One that only reads ('mode=ro') cannot, and
    would be refused until some other program did it. Where the file cannot be written SQLite itself falls
    back to reading.
    """
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=timeout)) as connection:
        connection.isolation_level = None  # sqlite3 begins nothing by itself
        connection.execute("PRAGMA query_only=ON")
        yield connection


def needs_rollback(error: sqlite3.Error) -> bool:
    """Whether a journal was left that cannot be rolled back, as file or folder cannot be written."""
    code = getattr(error, "sqlite_errorcode", None)
    return code in (sqlite3.SQLITE_READONLY_ROLLBACK, sqlite3.SQLITE_READONLY_RECOVERY)
