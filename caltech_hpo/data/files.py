"""Files that others made: opened so that none can hang the program, shown so that none garbles a terminal."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from caltech_hpo.errors import DataError

MOST_SHOWN = 10
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@dataclass
class Faults:
    """What is wrong with many files: all of them counted, the first ten kept to be shown."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Notes one fault."""
        self.count += 1
        if len(self.first) < MOST_SHOWN:
            self.first.append(text)

    def __str__(self) -> str:
        more = [f"and {self.count - len(self.first)} more"] if self.count > len(self.first) else []
        return "\n".join(f"  {line}" for line in (*self.first, *more))


def shown(text: object, most: int = 300) -> str:
    """The text in at most that many characters, with escapes for what could act on a terminal."""
    begin = str(text)[: most + 1]
    made = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in begin)
    return made if len(made) <= most else f"{made[: most - 3]}..."


def kind_of(mode: int) -> str:
    """What a file is that is no regular one, in words."""
    return KINDS.get(stat.S_IFMT(mode), "no regular file")


def read_regular(path: Path, most: int) -> bytes | None:
    """A file's content, or None if it has more than `most` bytes.

    Raises OSError if it cannot be read, and DataError for what is no regular file. It was one when its
    folder was read, and may have been replaced since: opening a named pipe would wait for a writer for ever.
    """
    # Windows has no O_NONBLOCK, and needs O_BINARY.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.ENXIO:  # what opening a socket answers
            raise
        raise _changed(path, "a socket or a device") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _changed(path, kind_of(status.st_mode))
    with os.fdopen(descriptor, "rb") as file:
        return None if status.st_size > most else file.read()


def _changed(path: Path, what: str) -> DataError:
    return DataError(f"{shown(path)}: is {what}, not a file", "put a file there, or remove it")
