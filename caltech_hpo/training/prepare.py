"""From a recipe and decoded images to what `train` runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from caltech_hpo.errors import WeightsError
from caltech_hpo.spec import Recipe
from caltech_hpo.training.device import resolve_precision, train_depthwise_in_fp32
from caltech_hpo.training.features import Split, Step, feature_source, views_of
from caltech_hpo.training.models import apply_freeze, build_model, split_frozen, weights_sha256
from caltech_hpo.training.sources import FeatureSource, ImageSource, Source, plan_for


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, independent of every other purpose's."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def model_for(recipe: Recipe, device: torch.device) -> nn.Module:
    """The recipe's model on the device, channels_last, frozen as the recipe says.

    Raises WeightsError when the weights file is missing, unsuitable, or another than the recipe's.
    """
    if recipe.weights_sha256 and weights_sha256(recipe.weights) != recipe.weights_sha256:
        raise WeightsError(
            f"{recipe.weights}: the file has changed since the recipe was made",
            "put the file back, or search again with the new one as NAME@2",
        )
    model = build_model(
        recipe.architecture, recipe.weights, recipe.classes,
        seed=derive_seed(recipe.seed, "weights"), dropout=recipe.dropout,
    )  # fmt: skip
    apply_freeze(model, recipe)
    train_depthwise_in_fp32(model, device, resolve_precision(recipe.precision, device))
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Prepared:
    """A training that is ready to begin.

    `model` is the whole model; `runs` is what computes on the sources' batches: the model on images,
    what follows the frozen prefix on its stored outputs. Both share their parameters.
    """

    model: nn.Module
    runs: nn.Module
    training: Source
    validation: Source | None
    device: torch.device


def prepare(
    recipe: Recipe, training: Split, validation: Split | None, device: torch.device, *,
    features: Path | None = None,
) -> Iterator[Step | Prepared]:  # fmt: skip
    """Yields steps while features are computed, then the prepared training.

    `features` is the folder where outputs of a frozen prefix are kept; None computes the prefix anew
    with every batch. Raises WeightsError as `model_for` does.
    """
    model = model_for(recipe, device)
    plan = plan_for(recipe, device)
    views = views_of(recipe)
    parts = split_frozen(model, recipe.architecture) if features is not None and views else None
    if parts is not None and features is not None:
        prefix, rest = parts
        precision = resolve_precision(recipe.precision, device)
        needed = {"training": (training, views)}
        if validation is not None:
            needed["validation"] = (validation, 2 if recipe.test_time_flip else 1)
        found: list[FeatureSource] = []
        for label, (split, count) in needed.items():
            for step in feature_source(
                prefix, recipe, split, plan, features, views=count, precision=precision, label=label
            ):
                if isinstance(step, FeatureSource):
                    found.append(step)
                elif step is not None:
                    yield step
        if len(found) == len(needed):
            yield Prepared(model, rest, found[0], found[1] if validation is not None else None, device)
            return
    yield Prepared(
        model, model, ImageSource(training.images, plan),
        ImageSource(validation.images, plan) if validation is not None else None, device,
    )  # fmt: skip
