"""The architectures as modules: built with a new head and their weights, and checked."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from caltech_hpo.errors import UsageError, WeightsError
from caltech_hpo.spec import Hyperparameters
from caltech_hpo.terms import TIMM, InitName
from caltech_hpo.training.architectures import architecture_info
from caltech_hpo.training.freezing import apply_freeze
from caltech_hpo.training.timm_models import (
    create_timm_model,
    from_timm,
    own_dropout,
)
from caltech_hpo.training.weights import NO_WEIGHTS, load_backbone, read_weights


class DropoutLinear(nn.Linear):
    """A linear layer with dropout before it, under the names and shapes of the plain one."""

    dropout = 0.0

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n, out_features) of features (n, in_features)."""
        return super().forward(nn.functional.dropout(features, self.dropout, self.training))


def build_model(
    architecture: str, weights: str, classes: int, *, seed: int, dropout: float | None = None,
    init: InitName = "default",
) -> nn.Module:  # fmt: skip
    """The architecture with a new head of `classes` outputs; input (n, 3, crop, crop).

    Every parameter that no weights file sets is drawn from `seed`; `init` is the rule of convolutions and
    linear layers but the head. `dropout` replaces the rates of the architecture's dropouts, or puts one
    before the head where it has none. Raises WeightsError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the libraries' initialisation knows only the global generator
        model = untrained(architecture, classes)
        if init == "kaiming":
            kaiming(model, model.get_submodule(architecture_info(architecture).head))
    if weights != NO_WEIGHTS:
        state, source = read_weights(architecture, weights)
        layout = "timm" if from_timm(architecture) else "torchvision"
        load_backbone(model, state, architecture_info(architecture).head, source, layout)
    if dropout is None and architecture.startswith(TIMM):
        dropout = own_dropout(architecture) or None
    if dropout is not None:
        set_dropout(model, architecture, dropout)
    return model


def untrained(architecture: str, classes: int) -> nn.Module:
    """The architecture, its parameters drawn from torch's global generator."""
    if from_timm(architecture):
        return create_timm_model(architecture, classes)
    from torchvision import models

    # weights=None: nothing is fetched here; transform_input and aux heads are not involved.
    model: nn.Module = models.get_model(architecture, weights=None, num_classes=classes)
    return model


def kaiming(model: nn.Module, head: nn.Module) -> None:
    """Draws every convolution and linear layer but the head anew, so that ReLUs keep their signal.

    He et al. 2015, https://arxiv.org/abs/1502.01852. AlexNet has neither that nor batch norm in
    torchvision: with torch's own rule each layer hands on a sixth of the variance, and the first epochs
    learn nothing. ResNet and VGG's convolutions begin so by themselves, but for the side that is counted.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer is not head:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def check_model(recipe: Hyperparameters, classes: int) -> None:
    """Raises WeightsError or UsageError where the recipe's model cannot be made, or not trained on its crops.

    That is bad weights, and a dropout or frozen blocks that the model has no place for.
    """
    architecture = recipe.architecture
    # without weights nothing is computed: VGG16's 138 million parameters take a second to draw
    shapes_alone = recipe.weights == NO_WEIGHTS and not from_timm(architecture)
    with torch.device("meta") if shapes_alone else contextlib.nullcontext():
        model = build_model(architecture, recipe.weights, classes, seed=0, dropout=recipe.dropout)
        apply_freeze(model, recipe)
        check_input(model, architecture, recipe.crop)


def check_input(model: nn.Module, architecture: str, crop: int) -> None:
    """Raises UsageError if the model cannot take an image of `crop` pixels: some take one size only."""
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, crop, crop))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{architecture} does not take images of {crop} pixels: {reason}", "change recipe.crop"
        ) from error


def set_dropout(model: nn.Module, architecture: str, rate: float) -> None:
    """Sets the rate of every dropout, or makes one before the head. Raises WeightsError without a head."""
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if dropouts and not architecture.startswith(TIMM):
        for module in dropouts:
            module.p = rate
        return
    head = model.get_submodule(architecture_info(architecture).head)
    if not isinstance(head, nn.Linear):
        raise WeightsError(
            f"{architecture}: dropout needs a linear head, not {type(head).__name__}", "leave dropout out"
        )
    head.__class__ = DropoutLinear  # the same parameters, in place, wherever the model refers to them
    head.dropout = rate  # type: ignore[assignment]
