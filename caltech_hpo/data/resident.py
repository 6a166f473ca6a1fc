"""Decoded images in a device's memory, cut and resized there: nothing but random draws crosses to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from caltech_hpo.data.cache import LabeledImages

BYTES_A_PIXEL = 3
PIECE = 1 << 24  # pixels that are copied to the device at a time


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for what the device still computes.

    CUDA copies asynchronously from pinned memory only; from other memory it waits for its queue first.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class ResidentImages:
    """Decoded images one after another: `pixels` (all pixels, 3) uint8, on the device.

    `starts` (n,) int64 is each image's first row of `pixels`, `sizes` (n, 2) int64 its height and width,
    both on the CPU, where crops are drawn; `labels` (n,) int64 is on the device. `+` concatenates.
    """

    pixels: Tensor
    starts: Tensor
    sizes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.starts)

    def __add__(self, other: ResidentImages) -> ResidentImages:
        return ResidentImages(
            torch.cat([self.pixels, other.pixels]),
            torch.cat([self.starts, other.starts + len(self.pixels)]),
            torch.cat([self.sizes, other.sizes]),
            torch.cat([self.labels, other.labels]),
        )

    def crops(
        self, chosen: Tensor, corners: Tensor, crop: int, mirrored: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Square crops (n, crop, crop, 3) uint8 of `chosen` images (n,), at (top, left) `corners` (n, 2).

        Those `mirrored` (n,) bool are turned left to right.
        """
        top, left = corners.unbind(1)
        widths = self.sizes[chosen, 1]
        first = to_device(self.starts[chosen] + top * widths + left, self.pixels.device)
        widths = to_device(widths, self.pixels.device)
        steps = torch.arange(crop, device=self.pixels.device)
        rows = first[:, None] + steps * widths[:, None]
        columns = steps[None]
        if mirrored is not None:
            columns = torch.where(to_device(mirrored, steps.device)[:, None], steps.flip(0), steps)
        return self.pixels[rows[:, :, None] + columns[:, None]]

    def batch(
        self, chosen: Tensor, corners: Tensor, crop: int, mirrored: Tensor | None, mean: Tensor, std: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`crops`, normalised by `mean` and `std` (3,) in pixel levels, in one pass, and their labels (n,).

        (n, 3, crop, crop) of `dtype`, channels_last. Only where `kernels_run`.
        """
        from caltech_hpo.data.crop_kernel import normalized_crops

        top, left = corners.unbind(1)
        widths = self.sizes[chosen, 1]
        flags = torch.zeros_like(widths) if mirrored is None else mirrored.long()
        drawn = torch.stack([self.starts[chosen] + top * widths + left, widths, flags, chosen])
        drawn = to_device(drawn, self.pixels.device)
        images = normalized_crops(self.pixels, drawn[:3], crop, mean, std, dtype)
        return images, self.labels[drawn[3]]

    def resized(
        self, chosen: Tensor, boxes: Tensor, crop: int, mirrored: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """The images' boxes (n, 4) of (top, left, height, width), each resized to (n, crop, crop, 3) uint8.

        Those `mirrored` (n,) bool are turned left to right.
        Antialiased bilinear, as Pillow's; some levels differ from Pillow's by 1, hardly any by 2.
        """
        device = self.pixels.device
        tall, wide = (int(side) for side in boxes[:, 2:].amax(0))
        columns = [boxes, self.starts[chosen, None], self.sizes[chosen, 1:]]
        top, left, height, width, start, stride = to_device(torch.cat(columns, 1), device).unbind(1)
        # what lies beyond a smaller box repeats its edge and has no weight
        y = torch.minimum(torch.arange(tall, device=device), height[:, None] - 1)
        x = torch.minimum(torch.arange(wide, device=device), width[:, None] - 1)
        rows = start[:, None] + (top[:, None] + y) * stride[:, None] + left[:, None]
        box = self.pixels[rows[:, :, None] + x[:, None, :]].float()
        # Pillow rounds to whole levels after each direction, halves up
        weights = resize_weights(width, wide, crop)
        if mirrored is not None:
            weights = torch.where(to_device(mirrored, device)[:, None, None], weights.flip(1), weights)
        across = (torch.einsum("nhwc,now->nhoc", box, weights) + 0.5).floor_()
        down = (torch.einsum("nhoc,nph->npoc", across, resize_weights(height, tall, crop)) + 0.5).floor_()
        return down.clamp_(0, 255).to(torch.uint8)


def resize_weights(sizes: Tensor, longest: int, crop: int) -> Tensor:
    """(n, crop, longest) float32: how much each of a side's pixels counts in each resized pixel.

    `sizes` (n,) are the sides' lengths. A triangle over the pixels near the resized pixel's centre, as
    wide as the side shrinks, its weights adding up to 1: Pillow's and torchvision's antialiased bilinear.
    """
    scale = sizes[:, None, None] / crop
    centers = torch.arange(0.5, crop, device=sizes.device)[None, :, None] * scale
    places = torch.arange(0.5, longest, device=sizes.device)[None, None, :]
    weights = (1 - (places - centers).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights = weights * (places < sizes[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def resident_bytes(data: LabeledImages) -> int:
    """What the images take in a device's memory."""
    return sum(image.nbytes for image in data.images)


def make_resident(data: LabeledImages, device: torch.device) -> ResidentImages:
    """Copies decoded images to the device, once."""
    sizes = torch.tensor([image.shape[:2] for image in data.images]).view(-1, 2)
    counts = sizes.prod(1)
    starts = counts.cumsum(0) - counts
    pixels = torch.empty((int(counts.sum()), BYTES_A_PIXEL), dtype=torch.uint8, device=device)
    # in few pieces, from memory that a GPU copies from by itself
    piece = min(len(pixels), max([PIECE, *counts.tolist()]))
    staging = torch.empty((piece, BYTES_A_PIXEL), dtype=torch.uint8)
    staging = staging.pin_memory() if device.type == "cuda" else staging
    first = filled = 0
    for image, count in zip(data.images, counts.tolist(), strict=True):
        if filled + count > len(staging):
            pixels[first : first + filled] = staging[:filled]
            first, filled = first + filled, 0
        staging[filled : filled + count].numpy()[:] = image.reshape(-1, BYTES_A_PIXEL)
        filled += count
    pixels[first : first + filled] = staging[:filled]
    return ResidentImages(pixels, starts, sizes, torch.from_numpy(data.labels).to(device))
