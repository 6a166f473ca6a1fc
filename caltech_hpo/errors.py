"""Every error that a user can cause or mend, with its exit code and the fix in its text."""

from __future__ import annotations


class CaltechHpoError(Exception):
    """Base of the errors shown to the user as one line instead of a traceback.

    `fix` says what to do; it is appended to the message.
    """

    exit_code = 2

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class UsageError(CaltechHpoError):
    """A wrong option, name or study file (exit code 2)."""

    exit_code = 2


class SpecError(UsageError):
    """A study file with errors; the message lists all of them, each with its key."""


class DataError(CaltechHpoError):
    """Images, split files, downloads or weights that are missing or unusable (exit code 3)."""

    exit_code = 3


class UnreadableImagesError(DataError):
    """Images that cannot be decoded; the message names them."""


class WeightsError(DataError):
    """A weights file that is missing, damaged or made for another architecture."""


class StorageError(CaltechHpoError):
    """A study database that cannot be opened, is damaged, or is held by another search (exit code 4)."""

    exit_code = 4


class StorageFullError(StorageError):
    """No room for what is to be written to the study database."""
