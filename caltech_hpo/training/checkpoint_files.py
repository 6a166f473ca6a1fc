"""The files of a checkpoint; known without torch."""

from __future__ import annotations

from pathlib import Path


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.name}.previous")


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written before it takes its place."""
    return path.with_name(f"{path.name}.tmp")


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint and the one before."""
    for file in (path, previous(path), unfinished(path)):
        file.unlink(missing_ok=True)
