"""Decoded images to normalised batches on the device: a plain generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from caltech_hpo.data.augment import Augmentation, crop_corners, flip_some, rotate_each
from caltech_hpo.data.cache import LabeledImages

CENTER_CROP = Augmentation()


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, for pixels scaled to [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# The report's scaling for training from scratch, to [-1, 1].
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# What torchvision's ImageNet weights were trained with (https://pytorch.org/vision/stable/models.html).
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class BatchPlan:
    """How a split becomes batches; `crop` in pixels."""

    batch_size: int
    crop: int
    normalization: Normalization
    device: torch.device


def training_batches(
    data: LabeledImages, plan: BatchPlan, augmentation: Augmentation,
    order: torch.Generator, draws: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """One epoch in an order drawn from `order`, augmented by `draws` (both CPU generators).

    Yields images (n, 3, crop, crop) float32, channels_last, and labels (n,) int64, on the device.
    The last batch may be smaller; one of a single image is left out, since batch norm cannot
    learn from one value.
    """
    permutation = torch.randperm(len(data), generator=order)
    for chosen in torch.split(permutation, plan.batch_size):
        if len(chosen) > 1 or len(data) == 1:
            yield make_batch(data, chosen.numpy(), plan, augmentation, draws)


def evaluation_batches(data: LabeledImages, plan: BatchPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, centre crops; tensors as in `training_batches`."""
    unused = torch.Generator()
    for chosen in torch.split(torch.arange(len(data)), plan.batch_size):
        yield make_batch(data, chosen.numpy(), plan, CENTER_CROP, unused)


def make_batch(
    data: LabeledImages, chosen: np.ndarray[tuple[int], np.dtype[np.int64]], plan: BatchPlan,
    augmentation: Augmentation, draws: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The images at positions `chosen` as one batch (see `training_batches`)."""
    crop = plan.crop
    images = [data.images[i] for i in chosen]
    sizes = torch.tensor([image.shape[:2] for image in images])
    corners = crop_corners(sizes, crop, random=augmentation.random_crop, generator=draws)
    pixels = np.empty((len(images), crop, crop, 3), dtype=np.uint8)
    for i, (image, (top, left)) in enumerate(zip(images, corners.tolist(), strict=True)):
        pixels[i] = image[top : top + crop, left : left + crop]
    # Pixels cross to the device as bytes, a quarter of their size as floats. NHWC in memory seen
    # as NCHW is what torch calls channels_last: no copy.
    batch = torch.from_numpy(pixels).to(plan.device, non_blocking=True).permute(0, 3, 1, 2)
    if augmentation.flip:
        batch = flip_some(batch, draws)
    batch = batch.float()
    if augmentation.rotation:
        batch = rotate_each(batch, augmentation.rotation, draws).contiguous(memory_format=torch.channels_last)
    normalize_(batch, plan.normalization)
    labels = torch.from_numpy(data.labels[chosen]).to(plan.device, non_blocking=True)
    return batch, labels


def normalize_(batch: Tensor, normalization: Normalization) -> Tensor:
    """Scales pixels of 0 to 255 to [0, 1], then subtracts the mean and divides by std, in place."""
    mean = torch.tensor(normalization.mean, device=batch.device).view(1, 3, 1, 1)
    std = torch.tensor(normalization.std, device=batch.device).view(1, 3, 1, 1)
    return batch.sub_(mean * 255).div_(std * 255)
