"""The folder that `final` writes: made beside its name, moved to it when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from caltech_hpo.data.cache import sync_folder
from caltech_hpo.spec import Recipe


def describe_model(recipe: Recipe, classes: tuple[str, ...]) -> dict[str, Any]:
    """Everything that is needed to rebuild the model and to feed it."""
    import torch

    from caltech_hpo.training.sources import plan_for

    normalization = plan_for(recipe, torch.device("cpu")).normalization
    return {
        "architecture": recipe.architecture,
        "classes": list(classes),
        "preprocessing": {
            "resize_short_side": recipe.resize, "center_crop": recipe.crop, "scale": "pixel / 255",
            "mean": list(normalization.mean), "std": list(normalization.std),
        },
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.hash,
    }  # fmt: skip


def write_json(path: Path, document: Any) -> None:
    """Writes the document as `write_text` does."""
    write_text(path, json.dumps(document, indent=2))


def write_text(path: Path, text: str) -> None:
    """Writes the file whole: temporary file, sync, rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def publish(folder: Path, target: Path) -> None:
    """Moves a finished folder to its name, over an earlier one without a score, and syncs."""
    shutil.rmtree(target, ignore_errors=True)
    sync_folder(folder)
    folder.replace(target)
    sync_folder(target.parent)
