"""From a recipe and decoded images to what `train` runs."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from caltech_hpo.errors import WeightsError
from caltech_hpo.spec import Recipe
from caltech_hpo.terms import TIMM
from caltech_hpo.timings import views_of
from caltech_hpo.training.convolutions import choose_convolutions
from caltech_hpo.training.device import resolve_precision
from caltech_hpo.training.features import Split, Step, feature_sources
from caltech_hpo.training.freezing import apply_freeze, split_frozen
from caltech_hpo.training.models import build_model
from caltech_hpo.training.sources import ImageSource, Source, plan_for
from caltech_hpo.training.weights import weights_sha256


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, independent of every other purpose's."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def model_for(recipe: Recipe, device: torch.device) -> nn.Module:
    """The recipe's model on the device, channels_last, frozen as the recipe says.

    Raises WeightsError when the weights file is missing, unsuitable, or another than the recipe's.
    """
    if recipe.weights_sha256 and weights_sha256(recipe.weights, recipe.architecture) != recipe.weights_sha256:
        raise WeightsError(
            f"{recipe.weights}: the file has changed since the recipe was made",
            "put the file back, or search again with the new one as NAME@2",
        )
    model = build_model(
        recipe.architecture, recipe.weights, recipe.classes,
        seed=derive_seed(recipe.seed, "weights"), dropout=recipe.dropout, init=recipe.init,
    )  # fmt: skip
    apply_freeze(model, recipe)
    choose_convolutions(model, recipe.architecture, device, resolve_precision(recipe.precision, device))
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Prepared:
    """A training that is ready to begin.

    `model` is the whole model; `runs` is what computes on the sources' batches: the model on images,
    what follows the frozen prefix on its stored outputs. Both share their parameters. `prefix` is the
    frozen one where it runs with every batch. `micro_batch` images are computed at a time (None: a whole
    batch), their gradients added up. `replays` says that there is memory for steps as a CUDA graph.
    """

    model: nn.Module
    runs: nn.Module
    training: Source
    validation: Source | None
    device: torch.device
    prefix: nn.Module | None = None
    micro_batch: int | None = None
    replays: bool = False


def frozen_parts(
    model: nn.Module, recipe: Recipe
) -> tuple[nn.Module, nn.Module] | None:  # fmt: skip
    """The frozen prefix and the rest, where the two one after another are the model.

    Not every head of timm is its last layer alone: a copy with other weights and statistics (a fresh
    batch norm does nothing that one could see) tries on one image whether anything is left out.
    """
    parts = split_frozen(model, recipe.architecture)
    if parts is None or not recipe.architecture.startswith(TIMM):
        return parts
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(model).cpu().eval()
    for tensor in (*probe.parameters(), *probe.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data.mul_(1 + 0.1 * noise).add_(0.02 * noise)
    probed = split_frozen(probe, recipe.architecture)
    assert probed is not None, "a copy is split like the model"
    image = torch.randn(1, 3, recipe.crop, recipe.crop, generator=generator)
    with torch.inference_mode():
        expected = probe(image)
        try:
            found = probed[1](probed[0](image))
        except RuntimeError:  # shapes that do not fit
            return None
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
    return parts if same else None


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
    parts = frozen_parts(model, recipe)
    if parts is not None and features is not None and views:
        prefix, rest = parts
        precision = resolve_precision(recipe.precision, device)
        needed = {"training": (training, views)}
        if validation is not None:
            needed["validation"] = (validation, 2 if recipe.test_time_flip else 1)
        for step in feature_sources(prefix, recipe, needed, plan, features, precision):
            if not isinstance(step, list):
                yield step
            elif step:
                yield Prepared(model, rest, step[0], step[1] if validation is not None else None, device)
                return
    frozen = parts[0] if parts is not None else None
    yield Prepared(
        model, model, ImageSource(training.images, plan),
        ImageSource(validation.images, plan) if validation is not None else None, device,
        frozen,
    )  # fmt: skip
