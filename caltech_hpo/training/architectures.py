"""The architectures as sequences: blocks, then a classifier whose last layer is the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from caltech_hpo.data.batches import HALF, IMAGENET, Normalization
from caltech_hpo.terms import TIMM


@dataclass(frozen=True)
class ArchitectureInfo:
    """`head` is the last linear layer's name, `classifier` the part that freeze = "classifier" freezes
    (the rest is "features"). `blocks` gives the features as modules that run one after another, what
    the classifier needs before it (pooling, flattening) in the last. `normalization` is what the
    ImageNet weights were trained with."""

    head: str
    classifier: str
    blocks: Callable[[Any], list[nn.Module]]
    normalization: Normalization = IMAGENET


def _cut(features: nn.Sequential, *, before: type[nn.Module] | None, after: type[nn.Module] | None) -> Any:
    """Splits a sequence before each module of one type, or after each of another."""
    groups: list[list[nn.Module]] = [[]]
    for module in features:
        if before is not None and isinstance(module, before) and groups[-1]:
            groups.append([])
        groups[-1].append(module)
        if after is not None and isinstance(module, after):
            groups.append([])
    return [group for group in groups if group]


def _with_pooling(groups: list[list[nn.Module]], model: Any) -> list[nn.Module]:
    groups[-1] = [*groups[-1], model.avgpool, nn.Flatten(1)]
    return [nn.Sequential(*group) for group in groups]


def _alexnet_blocks(model: Any) -> list[nn.Module]:
    return _with_pooling(_cut(model.features, before=nn.Conv2d, after=None), model)


def _vgg_blocks(model: Any) -> list[nn.Module]:
    return _with_pooling(_cut(model.features, before=None, after=nn.MaxPool2d), model)


def _resnet_blocks(model: Any) -> list[nn.Module]:
    stem = [model.conv1, model.bn1, model.relu, model.maxpool]
    return _with_pooling([stem, [model.layer1], [model.layer2], [model.layer3], [model.layer4]], model)


def _efficientnet_blocks(model: Any) -> list[nn.Module]:
    stem = nn.Sequential(model.conv_stem, model.bn1)
    return [stem, *model.blocks, nn.Sequential(model.conv_head, model.bn2, model.global_pool)]


class TimmFeatures(nn.Module):
    """A timm model up to its head: images (n, 3, crop, crop) to features (n, ...)."""

    def __init__(self, model: Any) -> None:
        """Shares the model's modules."""
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """What the head is given."""
        features: Tensor = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return features


ARCHITECTURES: dict[str, ArchitectureInfo] = {
    "alexnet": ArchitectureInfo("classifier.6", "classifier", _alexnet_blocks),
    "resnet18": ArchitectureInfo("fc", "fc", _resnet_blocks),
    "resnet34": ArchitectureInfo("fc", "fc", _resnet_blocks),
    "resnet50": ArchitectureInfo("fc", "fc", _resnet_blocks),
    "vgg16": ArchitectureInfo("classifier.6", "classifier", _vgg_blocks),
    "vgg16_bn": ArchitectureInfo("classifier.6", "classifier", _vgg_blocks),
    "efficientnet_lite0": ArchitectureInfo(
        "classifier", "classifier", _efficientnet_blocks,
        # (pixel - 127) / 128, as the companion package efficientnet_lite_pytorch prepares its images.
        Normalization((127 / 255,) * 3, (128 / 255,) * 3),
    ),
}  # fmt: skip


def architecture_info(architecture: str) -> ArchitectureInfo:
    """One of the table's, or what timm knows of a model of its own. Raises WeightsError without timm."""
    if not architecture.startswith(TIMM):
        return ARCHITECTURES[architecture]
    from caltech_hpo.training.timm_models import timm_config

    config = timm_config(architecture)
    head = config["classifier"]
    normalization = Normalization(tuple(config["mean"]), tuple(config["std"]))
    return ArchitectureInfo(head, head, lambda model: [TimmFeatures(model)], normalization)


def normalization_for(architecture: str, weights: str) -> Normalization:
    """What the images are scaled to: pretrained weights bring their own, else [-1, 1]."""
    return HALF if weights == "none" else architecture_info(architecture).normalization
