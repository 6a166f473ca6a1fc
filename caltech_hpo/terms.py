"""The words that a recipe is made of, and what holds for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat

# Every architecture and how many blocks `frozen_blocks` counts in it: AlexNet's convolutions, VGG's and
# ResNet's stages (ResNet's stem is one), EfficientNet's stem, stages and last convolution.
BLOCKS = {
    "alexnet": 5, "resnet18": 5, "resnet34": 5, "resnet50": 5, "vgg16": 5, "vgg16_bn": 5,
    "efficientnet_lite0": 9,
}  # fmt: skip
SMALLEST_ALPHA = 0.01  # of a Beta distribution that double precision can still draw from
TIMM = "timm/"  # and a model's name in timm


def _known_architecture(name: str) -> str:
    if name not in BLOCKS and not (name.startswith(TIMM) and len(name) > len(TIMM)):
        raise ValueError(f"unknown; use one of {', '.join(BLOCKS)}, or {TIMM}NAME for a model of timm")
    return name


def _off_or_drawable(alpha: float) -> float:
    if 0 < alpha < SMALLEST_ALPHA:
        raise ValueError(f"must be 0 (off) or at least {SMALLEST_ALPHA}")
    return alpha


Architecture = Annotated[str, AfterValidator(_known_architecture)]
Freeze = Literal["none", "features", "classifier"]
AugmentationName = Literal[
    "center_crop", "random_crop", "center_crop_flip", "random_crop_flip", "center_crop_rotation",
    "random_resized_crop", "random_resized_crop_flip", "concat",
]  # fmt: skip
OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["step", "cosine", "one_cycle"]
InitName = Literal["default", "kaiming"]
Precision = Literal["auto", "bf16", "fp32"]
FitOn = Literal["train", "train+val"]

# The smallest input whose feature map is not empty; AlexNet's three poolings need 63 pixels.
SMALLEST_CROP: dict[str, int] = {"alexnet": 63}
DEFAULT_SMALLEST_CROP = 32

Alpha = Annotated[FiniteFloat, Field(ge=0), AfterValidator(_off_or_drawable)]  # 0: off
