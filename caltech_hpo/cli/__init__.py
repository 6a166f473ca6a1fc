"""The command line: the only room that prints."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

from caltech_hpo.errors import CaltechHpoError, StorageError

INTERRUPTED = 130  # what a shell reports after Ctrl-C
TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    """The console script: errors become one message and an exit code; a bug is a traceback and 1."""
    # Importing makes many objects that stay: looking for garbage among them took 7% of 'studies' (n = 5).
    gc.set_threshold(100_000, 50, 50)
    signal.signal(signal.SIGTERM, _end)
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # class names may be unprintable
        from caltech_hpo.cli.app import app

        app()
    except CaltechHpoError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # "caltech-hpo report | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        fix = "give a --home that can be written, and check permissions and room"
        fail(f"{error.filename}: {error.strerror}\n  fix: {fix}", StorageError.exit_code)
    except Exception as error:
        if not is_database_error(error):
            raise
        from caltech_hpo.search.urls import redact

        reason = redact(reason_of(error), os.environ.get("CALTECH_HPO_STORAGE"))
        fix = "check that the database answers and is undamaged; restore a backup if it is not"
        if "readonly database" in reason:
            fix = "give a --home, or a --storage, that can be written"
        fail(f"the study database failed: {reason}\n  fix: {fix}", StorageError.exit_code)


def _end(*_: int | FrameType | None) -> None:
    """SIGTERM ends a command as Ctrl-C does: what is half-made is removed."""
    sys.exit(TERMINATED)


def fail(message: str, code: int) -> None:
    """Prints the error and ends the process."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def reason_of(error: BaseException) -> str:
    """What the database driver itself said, on one line; it names the file."""
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def is_database_error(error: Exception) -> bool:
    """Whether SQLAlchemy or Optuna's storage raised it (neither is imported for this question)."""
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return not names.isdisjoint({"sqlalchemy.exc.SQLAlchemyError", "optuna.exceptions.StorageInternalError"})
