"""One supervisor a study: a lock that the system, or the database server, releases when its holder dies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from caltech_hpo.errors import StorageError
from caltech_hpo.search.urls import parse_url, sqlite_path
from caltech_hpo.study_files import base_name

Check = Callable[[], None]
# Before a study's name, which never begins with "+": what else than its search holds a lock.
CONFIRM, FINAL = "+confirm-", "+final-"
SERVE = "+serve"
NAMED_WITHIN = 1.0  # seconds
CLOCKS = 60.0  # seconds that a machine's clock may have been set by since
FIX = "wait for it, or stop it with Ctrl-C; a second one adds nothing"


def no_check() -> None:
    """The check of a lock that cannot be lost while its process lives: a file's."""


def lock_path(url: str, home: Path, name: str) -> Path:
    """The lock file of a study.

    It lies beside a SQLite file, so that all who use the file meet there; for a database server that has
    no locks of its own, in the home.
    """
    path = sqlite_path(url)
    path = None if path is None else path.resolve()  # a link is the same database
    return (
        home / "locks" / f"{name}.lock"
        if path is None
        else path.parent / "locks" / f"{path.name}.{name}.lock"
    )


@contextlib.contextmanager
def study_lock(url: str, home: Path, name: str, what: str) -> Iterator[Check]:
    """Holds the lock `name` in the study database; yields a check that it is still held.

    A study's search is named after it, the others as above.

    PostgreSQL has locks that end with their connection; elsewhere it is a file's. Raises StorageError,
    saying which other `what` runs where, if a process holds it; the check, if it was lost to another one.
    """
    if parse_url(url).get_backend_name() == "postgresql":
        from caltech_hpo.search.postgres_lock import AdvisoryLock

        with contextlib.closing(AdvisoryLock(url, name, what)) as lock:
            yield lock.check
    else:
        with held(lock_path(url, home, name), what):
            yield no_check


def search_lock(url: str, home: Path, study: str) -> AbstractContextManager[Check]:
    """Holds the lock of a study's search, as `study_lock` does."""
    return study_lock(url, home, study, f"search on study '{study}'")


def confirm_lock(url: str, home: Path, study: str) -> AbstractContextManager[Check]:
    """Holds the lock of a study's `confirm`, as `study_lock` does."""
    return study_lock(url, home, CONFIRM + study, f"confirm of study '{study}'")


def final_lock(url: str, home: Path, study: str) -> AbstractContextManager[Check]:
    """Holds the lock of `final`, as `study_lock` does.

    NAME and all NAME@2 have one, so that not two of them take the first test score.
    """
    base = base_name(study)
    return study_lock(url, home, FINAL + base, f"final training of study '{base}'")


def serve_lock(url: str, home: Path) -> AbstractContextManager[Check]:
    """Holds the lock of a database's `serve`, as `study_lock` does."""
    return study_lock(url, home, SERVE, "serve on this database")


@contextlib.contextmanager
def all_locks(url: str, home: Path, *studies: str) -> Iterator[None]:
    """Holds what the studies' search, `confirm` and `final` hold. Raises StorageError if one of them runs."""
    with contextlib.ExitStack() as stack:
        for study in studies:
            stack.enter_context(search_lock(url, home, study))
            stack.enter_context(confirm_lock(url, home, study))
        for base in dict.fromkeys(map(base_name, studies)):
            stack.enter_context(final_lock(url, home, base))
        yield


def holders_of(url: str, home: Path, names: Iterable[str]) -> dict[str, str]:
    """Who holds these locks in the study database, in words; those that nobody holds are left out.

    Lock files are read, nothing is written; who wrote themselves into one and were killed since do not
    count, as far as this machine can tell.
    """
    if parse_url(url).get_backend_name() == "postgresql":
        from caltech_hpo.search.postgres_lock import holders_there

        return holders_there(url, names)
    found = {}
    for name in names:
        who = _written(lock_path(url, home, name))
        if who is not None and _lives(who):
            here = who["host"] == socket.gethostname()
            found[name] = _in_words(who) + ("" if here else ", if it lives: another machine cannot be asked")
    return found


def _lives(who: dict[str, Any]) -> bool:
    """Whether it is no process of this machine, or one that was there when it took its lock."""
    import psutil

    if who["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(who["process"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        born = float(process.create_time())
    except psutil.Error:  # it is gone, or /proc hides it from us
        return _exists(who["process"])
    return born <= datetime.fromisoformat(who["since"]).timestamp() + CLOCKS


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Holds a lock file. Raises StorageError, saying which other `what` runs, if a process holds it."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise StorageError(f"another {what} is running{_holder(path)} (it holds {path})", FIX) from error
    except OSError as error:
        raise StorageError(
            f"{path.parent}: {error.strerror}", "give a writable --home or --storage"
        ) from error
    try:
        with contextlib.suppress(OSError):  # a full disk: then nobody learns who it is
            path.write_text(json.dumps(_ourselves()), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):  # the next one is not taken for this one
            path.write_text("", encoding="utf-8")
        lock.release()


def _ourselves() -> dict[str, str | int]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(path: Path) -> str:
    """Who wrote themselves into a lock file, if it can be read; who has just taken it is about to."""
    until = time.monotonic() + NAMED_WITHIN
    while (who := _written(path)) is None or not _lives(who):  # it was killed: this is the one before
        if time.monotonic() > until:
            return ""
        time.sleep(0.02)
    return f": {_in_words(who)}"


def _written(path: Path) -> dict[str, Any] | None:
    """What the latest holder of a lock file wrote into it."""
    try:
        who: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        datetime.fromisoformat(who["since"])
        return {"process": int(who["process"]), "host": str(who["host"]), "since": who["since"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _in_words(who: dict[str, Any]) -> str:
    return f"process {who['process']} on {who['host']}, since {who['since']}"


def lock_number(name: str) -> int:
    """PostgreSQL knows its locks by numbers of 64 bits, signed."""
    return int.from_bytes(hashlib.sha256(f"caltech-hpo {name}".encode()).digest()[:8], signed=True)
