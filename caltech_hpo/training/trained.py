"""A trained model in a file that says what it is, and what it answers to images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from caltech_hpo.data.cache import LabeledImages
from caltech_hpo.data.decode import Pixels
from caltech_hpo.errors import WeightsError
from caltech_hpo.spec import Recipe
from caltech_hpo.training.checkpoint import load_weights, weights_metadata
from caltech_hpo.training.device import autocast, resolve_precision
from caltech_hpo.training.models import build_model
from caltech_hpo.training.sources import ImageSource, plan_for

DESCRIPTION = "caltech_hpo"  # the key in a safetensors file's metadata
BATCH = 64


def describe_model(recipe: Recipe, classes: Sequence[str]) -> dict[str, Any]:
    """Everything that is needed to rebuild the model and to feed it."""
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


@dataclass(frozen=True)
class TrainedModel:
    """A file of weights, the recipe that it was trained with, and its classes in the order of outputs."""

    weights: Path
    recipe: Recipe
    classes: tuple[str, ...]

    @property
    def description(self) -> dict[str, Any]:
        """As `describe_model` gives it."""
        return describe_model(self.recipe, self.classes)


def read_trained(path: Path) -> TrainedModel:
    """What a .safetensors file of ours says of itself, or the model.json beside an older one.

    `path` may be the folder that `final` wrote. Raises WeightsError.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    fix = (
        "give a model of caltech-hpo's: storage/models/.../model.safetensors, or ...-best-trialN.safetensors"
    )
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such model", fix)
    text = weights_metadata(path).get(DESCRIPTION)
    beside = path.with_name("model.json")
    try:
        document = json.loads(text if text is not None else beside.read_text(encoding="utf-8"))
        recipe, classes = Recipe.model_validate(document["recipe"]), tuple(map(str, document["classes"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise WeightsError(f"{path}: does not say which model and classes it holds", fix) from error
    if not all(name.isprintable() for name in classes):  # they will be shown on a terminal
        raise WeightsError(f"{path}: names classes with control characters", fix)
    if len(classes) != recipe.classes:
        raise WeightsError(f"{path}: names {len(classes)} classes of {recipe.classes}", fix)
    return TrainedModel(path, recipe, classes)


def load_model(trained: TrainedModel, device: torch.device) -> nn.Module:
    """The model with its weights, for evaluation; input (n, 3, crop, crop), output logits (n, classes)."""
    recipe = trained.recipe
    model = build_model(recipe.architecture, "none", recipe.classes, seed=0, dropout=recipe.dropout)
    try:
        load_weights(model, trained.weights)
    except RuntimeError as error:  # another version's architecture
        raise WeightsError(
            f"{trained.weights}: not weights of {recipe.architecture}", "train it again with this version"
        ) from error
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


@torch.inference_mode()
def probabilities(model: nn.Module, recipe: Recipe, images: Sequence[Pixels], device: torch.device) -> Tensor:
    """(n, classes) float32 on the CPU, rows that sum to 1.

    `images` are (height, width, 3) uint8 with the recipe's short side. With the recipe's test-time flip:
    the mean over each image and its mirror image.
    """
    if not images:
        return torch.empty(0, recipe.classes)
    labels = np.zeros(len(images), dtype=np.int64)
    source = ImageSource(LabeledImages(list(images), labels), plan_for(recipe, device)).in_batches_of(BATCH)
    precision = resolve_precision(recipe.precision, device)
    views = []
    for flipped in (False, True) if recipe.test_time_flip else (False,):
        found = []
        for batch, _ in source.evaluation(flipped=flipped):
            with autocast(device, precision):
                found.append(model(batch).float().softmax(1).cpu())
        views.append(torch.cat(found))
    mean = torch.stack(views).mean(0)
    if not mean.isfinite().all():
        raise WeightsError("the model's answers are not numbers", "its weights are damaged: train it again")
    return mean
