"""The architectures side by side: layers, parameters, FLOPs, activation memory.

Nothing is computed on real tensors: torch's "meta" device knows shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from caltech_hpo.errors import UsageError
from caltech_hpo.terms import DEFAULT_SMALLEST_CROP, SMALLEST_CROP, TIMM
from caltech_hpo.training.architectures import ARCHITECTURES
from caltech_hpo.training.memory_estimate import saved_bytes
from caltech_hpo.training.models import untrained
from caltech_hpo.training.timm_models import timm_config


@dataclass(frozen=True)
class ModelSummary:
    """`layers` counts convolutions and linear layers on the main path, as the architectures' names do;
    `flops` is one image's forward pass, a multiplication and an addition counted as two;
    `activation_bytes` is what training keeps per image for the backward pass in fp32."""

    architecture: str
    crop: int
    classes: int
    layers: int
    parameters: int
    head_parameters: int
    flops: int
    activation_bytes: int


def require_architecture(name: str) -> None:
    """Raises UsageError for an unknown architecture, naming the known ones."""
    if name.startswith(TIMM):
        timm_config(name)
    elif name not in ARCHITECTURES:
        raise UsageError(
            f"there is no architecture '{name}'", f"known: {', '.join(ARCHITECTURES)}, {TIMM}NAME"
        )


def meta_model(architecture: str, classes: int) -> nn.Module:
    """The architecture without memory for its parameters."""
    with torch.device("meta"):
        return untrained(architecture, classes)


def summarize(architecture: str, *, crop: int = 224, classes: int = 101) -> ModelSummary:
    """Counts for one architecture. Raises UsageError when the crop is too small for it."""
    from torch.utils.flop_counter import FlopCounterMode

    smallest = SMALLEST_CROP.get(architecture, DEFAULT_SMALLEST_CROP)
    if crop < smallest:
        raise UsageError(f"crop {crop} is too small for {architecture}", f"use at least {smallest}")
    model = meta_model(architecture, classes)
    counter = FlopCounterMode(display=False)
    with counter:
        model.eval()(torch.empty(1, 3, crop, crop, device="meta"))
    modules = [
        (name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    return ModelSummary(
        architecture=architecture,
        crop=crop,
        classes=classes,
        layers=sum("downsample" not in name for name, _ in modules),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        head_parameters=sum(parameter.numel() for parameter in modules[-1][1].parameters()),
        flops=counter.get_total_flops(),
        activation_bytes=activation_bytes(model, crop),
    )


def activation_bytes(model: nn.Module, crop: int) -> int:
    """Bytes per image that the backward pass needs, parameters and input left out, each tensor once.

    Taken as the difference between two images and one, so that what does not grow with the batch
    drops out.
    """
    return _saved(model, crop, 3) - _saved(model, crop, 2)


def _saved(model: nn.Module, crop: int, images: int) -> int:
    return saved_bytes(model.train(), torch.empty(images, 3, crop, crop, device="meta"))
