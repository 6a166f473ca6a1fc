"""Decoded images to normalised batches on the device: a plain generator."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from caltech_hpo.data.augment import (
    CROP_RATIOS,
    Augmentation,
    boxes,
    crop_corners,
    erase_some,
    jitter_each,
    mix,
    rotate_each,
)
from caltech_hpo.data.cache import LabeledImages
from caltech_hpo.data.decode import Pixels
from caltech_hpo.data.kernel_check import kernels_run
from caltech_hpo.data.resident import ResidentImages, to_device

# Where pixels are: in the cache file, or in the device's memory.
Images = LabeledImages | ResidentImages
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
    """How a split becomes batches; `crop` in pixels, the others as in `Hyperparameters`.

    What follows `device` applies to training alone, but for `dtype`, the images'. With `mixup` or `cutmix`,
    labels become shares of `classes`.
    """

    batch_size: int
    crop: int
    normalization: Normalization
    device: torch.device
    augmentation: Augmentation = CENTER_CROP
    smallest_area: float = 0.08
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    classes: int = 0
    dtype: torch.dtype = torch.float32


def batch_sizes(images: int, plan: BatchPlan) -> list[int]:
    """The sizes of an epoch's training batches.

    The last may be smaller; one of a single image is left out, since batch norm cannot learn from one
    value.
    """
    images *= len(plan.augmentation.copies) or 1
    full, rest = divmod(images, plan.batch_size)
    return [plan.batch_size] * full + ([rest] if rest > 1 or images == 1 else [])


def training_batches(
    data: Images, plan: BatchPlan, order: torch.Generator, draws: torch.Generator, *, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in an order drawn from `order`, augmented by `draws` (both CPU generators).

    Begins with batch `start`. Yields images (n, 3, crop, crop), channels_last, and labels (n,)
    int64 (or shares (n, classes) float32), on the device; n as `batch_sizes` says.
    """
    copies = plan.augmentation.copies or (plan.augmentation,)
    permutation = torch.randperm(len(data) * len(copies), generator=order)
    batches = torch.split(permutation[: sum(batch_sizes(len(data), plan))], plan.batch_size)
    for chosen in batches[start:]:
        positions, copy = chosen % len(data), chosen // len(data)
        batch, labels = make_batch(data, positions, plan, copies[0], draws)
        for number, augmentation in enumerate(copies[1:], start=1):
            mine = (copy == number).nonzero()[:, 0]
            if len(mine):
                copies_of_mine = make_batch(data, positions[mine], plan, augmentation, draws)[0]
                batch[to_device(mine, plan.device)] = copies_of_mine
        if plan.erasing:
            batch = erase_some(batch, plan.erasing, draws)
        if plan.mixup or plan.cutmix:
            batch, labels = mix(batch, labels, plan.classes, plan.mixup, plan.cutmix, draws)
        yield batch.contiguous(memory_format=torch.channels_last), labels


def evaluation_batches(data: Images, plan: BatchPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, centre crops; tensors as in `training_batches`."""
    unused = torch.Generator()
    plain = replace(plan, color_jitter=0.0)
    for chosen in torch.split(torch.arange(len(data)), plan.batch_size):
        yield make_batch(data, chosen, plain, CENTER_CROP, unused)


def make_batch(
    data: Images, chosen: Tensor, plan: BatchPlan, augmentation: Augmentation, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The images at positions `chosen` (n,) as one batch (see `training_batches`)."""
    if (
        isinstance(data, ResidentImages) and not (plan.color_jitter or augmentation.rotation)
        and not augmentation.resized and kernels_run(data.pixels.device)
    ):  # fmt: skip
        corners, mirrored = drawn_crops(data.sizes[chosen], plan.crop, augmentation, draws)
        mean, std = _levels(plan.normalization, data.pixels.device, 1)
        return data.batch(chosen, corners, plan.crop, mirrored, mean, std, plan.dtype)
    # NHWC in memory seen as NCHW is what torch calls channels_last: no copy.
    batch = cropped(data, chosen, plan, augmentation, draws).permute(0, 3, 1, 2)
    if plan.color_jitter:
        batch = jitter_each(batch.float(), plan.color_jitter, draws)
    if augmentation.rotation:
        turned = rotate_each(batch.float(), augmentation.rotation, draws)
        batch = turned.contiguous(memory_format=torch.channels_last)
    batch = normalized(batch, plan.normalization).to(plan.dtype)
    if isinstance(data, ResidentImages):
        return batch, data.labels[to_device(chosen, plan.device)]
    return batch, to_device(torch.from_numpy(data.labels[chosen.numpy()]), plan.device)


def cropped(
    data: Images, chosen: Tensor, plan: BatchPlan, augmentation: Augmentation, draws: torch.Generator
) -> Tensor:
    """The chosen images' crops: (n, crop, crop, 3) uint8, on the device; drawn alike for both `Images`."""
    if isinstance(data, ResidentImages):
        images, sizes = [], data.sizes[chosen]
    else:
        images = [data.images[i] for i in chosen.tolist()]
        sizes = torch.tensor([image.shape[:2] for image in images])
    if augmentation.resized:
        places = boxes(sizes, (plan.smallest_area, 1.0), CROP_RATIOS, draws)
        mirrored = drawn_mirrored(len(chosen), augmentation, draws)
    else:
        places, mirrored = drawn_crops(sizes, plan.crop, augmentation, draws)
    if isinstance(data, ResidentImages):
        cut = data.resized if augmentation.resized else data.crops
        return cut(chosen, places, plan.crop, mirrored)
    cut_here = resized_on_host if augmentation.resized else crops_on_host
    pixels = cut_here(images, places.tolist(), plan.crop)
    for i in mirrored.nonzero()[:, 0].tolist() if mirrored is not None else ():
        pixels[i] = pixels[i, :, ::-1].copy()
    # pixels cross to the device as bytes, a quarter of their size as floats
    return to_device(torch.from_numpy(pixels), plan.device)


def drawn_crops(
    sizes: Tensor, crop: int, augmentation: Augmentation, draws: torch.Generator
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Corners (n, 2) of crops of images of these sizes (n, 2), and which are mirrored (n,) bool, if any."""
    corners = crop_corners(sizes, crop, random=augmentation.random_crop, generator=draws)
    return corners, drawn_mirrored(len(sizes), augmentation, draws)


def drawn_mirrored(count: int, augmentation: Augmentation, draws: torch.Generator) -> Tensor | None:
    """(count,) bool, None where none is."""
    return torch.rand(count, generator=draws) < augmentation.flip if augmentation.flip else None


def crops_on_host(images: list[Pixels], corners: list[list[int]], crop: int) -> Pixels:
    """Each image's square crop at its (top, left): (n, crop, crop, 3) uint8."""
    pixels = np.empty((len(images), crop, crop, 3), dtype=np.uint8)
    for i, (image, (top, left)) in enumerate(zip(images, corners, strict=True)):
        pixels[i] = image[top : top + crop, left : left + crop]
    return pixels


def resized_on_host(images: list[Pixels], places: list[list[int]], crop: int) -> Pixels:
    """Each image's box of (top, left, height, width), resized by Pillow: (n, crop, crop, 3) uint8."""
    pixels = np.empty((len(images), crop, crop, 3), dtype=np.uint8)
    for i, (image, (top, left, tall, wide)) in enumerate(zip(images, places, strict=True)):
        box = Image.fromarray(image[top : top + tall, left : left + wide])
        pixels[i] = np.asarray(box.resize((crop, crop), Image.Resampling.BILINEAR))
    return pixels


def normalized(batch: Tensor, normalization: Normalization) -> Tensor:
    """Scales pixels of 0 to 255 (n, 3, height, width) to [0, 1], subtracts the mean and divides by std.

    The result is float32, a new tensor.
    """
    rows = batch.permute(0, 2, 3, 1)
    if rows.is_contiguous():  # channels_last: whole rows of pixels, three times as fast on a CPU as colours
        mean, std = _levels(normalization, batch.device, batch.shape[3])
        levels = rows.view(-1, len(mean))  # bytes become floats on the way: a pass less over the memory
        return levels.sub(mean).div_(std).view(rows.shape).permute(0, 3, 1, 2)
    mean, std = (level.view(1, 3, 1, 1) for level in _levels(normalization, batch.device, 1))
    return batch.sub(mean).div_(std)


@functools.lru_cache(maxsize=16)  # a tensor made for every batch would make a GPU wait for its copy
def _levels(normalization: Normalization, device: torch.device, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in pixel levels, (3 * pixels,) each: red, green, blue, red, ..."""
    mean = torch.tensor(normalization.mean, device=device).repeat(pixels)
    std = torch.tensor(normalization.std, device=device).repeat(pixels)
    return mean * 255, std * 255
