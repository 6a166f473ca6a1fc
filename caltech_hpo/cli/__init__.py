"""The command line: the only room that prints."""

from __future__ import annotations

import contextlib
import os
import sys

from caltech_hpo.errors import CaltechHpoError


def main() -> None:
    """The console script: our errors become one message and their exit code, a bug a traceback (1)."""
    from caltech_hpo.cli.app import app
    from caltech_hpo.cli.options import say

    try:
        app()
    except CaltechHpoError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # "caltech-hpo report | head"
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
