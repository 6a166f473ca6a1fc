"""The architectures, their weights, the new head, and what a freeze mode freezes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caltech_hpo.errors import WeightsError
from caltech_hpo.spec import Freeze

NO_WEIGHTS = "none"
IMAGENET_WEIGHTS = "imagenet"


@dataclass(frozen=True)
class ArchitectureInfo:
    """Where torchvision keeps things: `head` is the last linear layer's name, `classifier` the part
    that freeze = "classifier" freezes (the rest is "features")."""

    head: str
    classifier: str


ARCHITECTURES: dict[str, ArchitectureInfo] = {
    "alexnet": ArchitectureInfo("classifier.6", "classifier"),
    "resnet18": ArchitectureInfo("fc", "fc"),
    "resnet34": ArchitectureInfo("fc", "fc"),
    "resnet50": ArchitectureInfo("fc", "fc"),
    "vgg16": ArchitectureInfo("classifier.6", "classifier"),
    "vgg16_bn": ArchitectureInfo("classifier.6", "classifier"),
}


def build_model(architecture: str, weights: str, classes: int, *, seed: int) -> nn.Module:
    """The architecture with a new head of `classes` outputs; input (n, 3, crop, crop).

    Every parameter that no weights file sets is drawn from `seed`. Raises WeightsError.
    """
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchvision's initialisation knows only the global generator
        # weights=None: nothing is fetched here; transform_input and aux heads are not involved.
        model: nn.Module = models.get_model(architecture, weights=None, num_classes=classes)
    if weights != NO_WEIGHTS:
        state, source = read_weights(architecture, weights)
        load_backbone(model, state, ARCHITECTURES[architecture].head, source)
    return model


def imagenet_file(architecture: str) -> tuple[Path, str]:
    """Where torchvision caches the architecture's default ImageNet weights, and their address."""
    from torchvision import models

    url: str = models.get_model_weights(architecture).DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1], url


def read_weights(architecture: str, weights: str) -> tuple[dict[str, Tensor], str]:
    """The state dictionary of "imagenet" (fetched into torchvision's cache) or of a file, and its source."""
    if weights == IMAGENET_WEIGHTS:
        from torchvision import models

        path, url = imagenet_file(architecture)
        try:
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


def load_backbone(model: nn.Module, state: dict[str, Tensor], head: str, source: str) -> None:
    """Copies everything but the head. Raises WeightsError naming what is missing or of another shape."""
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
            "give weights in torchvision's layout of the study's architecture",
        )
    model.load_state_dict({name: state[name] for name in own}, strict=False)


def weights_sha256(weights: str) -> str:
    """SHA-256 of a weights file, for the recipe; empty for "none" and "imagenet" (torchvision pins those)."""
    if weights in (NO_WEIGHTS, IMAGENET_WEIGHTS):
        return ""
    path = Path(weights)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such weights file", "check --weights, or the study's file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def apply_freeze(model: nn.Module, architecture: str, freeze: Freeze) -> None:
    """Sets requires_grad: "features" trains only the classifier, "classifier" only the features.

    As in the report, freezing the classifier freezes the new, random head as well.
    """
    prefix = f"{ARCHITECTURES[architecture].classifier}."
    for name, parameter in model.named_parameters():
        part = "classifier" if name.startswith(prefix) else "features"
        parameter.requires_grad_(part != freeze)


def training_mode(model: nn.Module) -> None:
    """Training mode, except for frozen batch norms: their statistics must stay those of the weights."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()
