"""The folder that `final` writes: made beside its name, moved to it when it is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from caltech_hpo.data.cache import sync_folder, write_whole

WEIGHTS = "model.safetensors"


def has_weights(folder: Path) -> bool:
    """Whether the folder that `final` made still has its weights."""
    return (folder / WEIGHTS).is_file()


def kept_folder(model_file: str, models: Path) -> Path | None:
    """Where `final` has left a model: as its score says, or under the same name in `models`; None if gone.

    Scores of a home that was moved, or that was given as a relative path, say another place.
    """
    said = Path(model_file).parent
    return next((folder for folder in (said, models / said.name) if folder.is_dir()), None)


def write_json(path: Path, document: Any) -> None:
    """Writes the document as `write_text` does."""
    write_text(path, json.dumps(document, indent=2))


def write_text(path: Path, text: str) -> None:
    """Writes the file as `write_whole` does."""
    write_whole(path, text.encode())


def publish(folder: Path, target: Path) -> None:
    """Moves a finished folder to its name, over an earlier one without a score, and syncs."""
    shutil.rmtree(target, ignore_errors=True)
    for left in folder.glob("*.tmp"):  # by a process that was killed
        left.unlink()
    sync_folder(folder)
    folder.replace(target)
    sync_folder(target.parent)
