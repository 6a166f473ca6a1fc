"""The files of a checkpoint; known without torch."""

from __future__ import annotations

from pathlib import Path

import psutil


def has_checkpoint(path: Path) -> bool:
    """Whether there is one, or the one before it."""
    return path.exists() or previous(path).exists()


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.name}.previous")


def is_abandoned(path: Path) -> bool:
    """Whether a file is one that a process did not live to finish."""
    _, _, process = path.name.removesuffix(".tmp").rpartition(".")
    return path.suffix == ".tmp" and process.isdigit() and not psutil.pid_exists(int(process))


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, the one before, and what killed processes left unfinished."""
    for file in (path, previous(path), *path.parent.glob(f"{path.name}.*.tmp")):
        file.unlink(missing_ok=True)
