"""The files of a checkpoint; known without torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.name}.previous")


def unfinished(path: Path) -> Path:
    """The folder in which a file is written before it takes its place; of this process alone."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def is_abandoned(path: Path) -> bool:
    """Whether it is what a process did not live to finish."""
    _, _, process = path.name.removesuffix(".tmp").rpartition(".")
    return path.suffix == ".tmp" and process.isdigit() and not psutil.pid_exists(int(process))


def remove(path: Path) -> None:
    """Removes a file, or a folder with what is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, the one before, and what killed processes left unfinished."""
    for file in (path, previous(path), *path.parent.glob(f"{path.name}.*.tmp")):
        remove(file)
