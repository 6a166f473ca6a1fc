"""One supervisor a study: a lock that the system releases when its holder dies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from caltech_hpo.errors import StorageError
from caltech_hpo.search.storage import sqlite_path


def lock_path(url: str, home: Path, name: str) -> Path:
    """The lock file of a study.

    It lies beside a SQLite file, so that all who use the file meet there; for a database server, in
    the home.
    """
    path = sqlite_path(url)
    return (
        home / "locks" / f"{name}.lock"
        if path is None
        else path.parent / "locks" / f"{path.name}.{name}.lock"
    )


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Holds a lock file. Raises StorageError, saying that another `what` runs, if a process holds it."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise StorageError(
            f"another {what} is running (it holds {path})",
            "wait for it, or stop it with Ctrl-C; a second one adds nothing",
        ) from error
    except OSError as error:
        raise StorageError(
            f"{path.parent}: {error.strerror}", "give a writable --home or --storage"
        ) from error
    try:
        yield
    finally:
        lock.release()
