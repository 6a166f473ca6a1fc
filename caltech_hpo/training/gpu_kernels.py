"""Triton kernels for what stands between convolutions: one pass over the memory where torch makes several.

They take images in channels_last, that is a matrix of (n * height * width, channels), and compute in float32;
all but `pixels_of_blocks` take channels in multiples of 16. Sums go over blocks in a fixed order: the same
inputs, the same sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 64  # channels that a program takes: a row of them is a line of the cache in bf16
ELEMENTS = 4096  # that it has in hand at a time
PROGRAMS = 528  # of a sum: four for each multiprocessor of an H100
WARPS = 8
NOWHERE = tl.constexpr(255)  # in place of a window's largest pixel, where ReLU passes no gradient on
Pools = tuple[int, int, int]  # a max pooling's kernel, stride and padding
ROWS = ["rows", "rows_each"]  # of any number: each would be compiled again where 16 divides it


def matrix(images: Tensor) -> tuple[int, int]:
    """Rows and columns (channels) of the images."""
    return images.numel() // images.shape[1], images.shape[1]


def tiles(rows: int, channels: int, elements: int) -> tuple[tuple[int, int], dict[str, int]]:
    """A program for every tile of so many elements, and what is constant of it."""
    wide = min(WIDE, channels & -channels)
    tall = elements // wide
    return (triton.cdiv(rows, tall), channels // wide), {"TALL": tall, "WIDE": wide, "num_warps": WARPS}


def summing_tiles(rows: int, channels: int, elements: int) -> tuple[tuple[int, int], dict[str, int], int]:
    """Programs that each sum over so many rows (the last), tile by tile, and what is constant of them."""
    (down, across), constants = tiles(rows, channels, elements)
    each = constants["TALL"] * triton.cdiv(down, max(1, PROGRAMS // across))
    return (triton.cdiv(rows, each), across), constants, each


def in_rows(images: Tensor) -> Tensor:
    """In channels_last: a copy only where they are not."""
    return images.contiguous(memory_format=torch.channels_last)


def like(images: Tensor, **more: Any) -> Tensor:
    """Uninitialised, in channels_last."""
    return torch.empty_like(images, memory_format=torch.channels_last, **more)


@triton.jit(do_not_specialize=ROWS)
def _rectified_sums(
    gradient, output, masked, sums, rows, rows_each, channels, TALL: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    first = tl.program_id(0) * rows_each
    total = tl.zeros([TALL, WIDE], tl.float32)
    for start in range(first, min(first + rows_each, rows), TALL):
        row = start + tl.arange(0, TALL)
        place = row.to(tl.int64)[:, None] * channels + column[None, :]
        there = (row < rows)[:, None]
        slope = tl.load(gradient + place, there, 0.0).to(tl.float32)
        passes = tl.load(output + place, there, 0.0).to(tl.float32)
        slope = tl.where(passes <= 0, 0.0, slope)  # NaN stays
        tl.store(masked + place, slope.to(masked.dtype.element_ty), there)
        total += slope
    tl.store(sums + tl.program_id(0) * channels + column, tl.sum(total, 0))


def relu_gradient(gradient: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """What ReLU passes on of the gradient of its `output` (n, channels, h, w), and its sums (channels,)."""
    gradient, output = in_rows(gradient), in_rows(output)
    rows, channels = matrix(output)
    grid, constants, each = summing_tiles(rows, channels, ELEMENTS)
    masked = like(output)
    sums = torch.empty((grid[0], channels), device=output.device)
    with torch.cuda.device_of(output):
        _rectified_sums[grid](gradient, output, masked, sums, rows, each, channels, **constants)
    return masked, sums.sum(0)


@triton.jit(do_not_specialize=["rows"])
def _largest(
    images, stats, output, places, rows, channels, height, width, pooled_height, pooled_width,
    TALL: tl.constexpr, WIDE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    NORMALIZES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    image, inner = row // (pooled_height * pooled_width), row % (pooled_height * pooled_width)
    top = inner // pooled_width * STRIDE - PADDING
    left = inner % pooled_width * STRIDE - PADDING
    best = tl.full([TALL, WIDE], float("-inf"), tl.float32)
    which = tl.zeros([TALL, WIDE], tl.int32)
    if NORMALIZES:
        scale = tl.load(stats + 2 * channels + column)[None, :]
        shift = tl.load(stats + 3 * channels + column)[None, :]
    for tap in tl.static_range(KERNEL * KERNEL):
        y, x = top + tap // KERNEL, left + tap % KERNEL
        there = ((row < rows) & (y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        place = ((image * height + y).to(tl.int64) * width + x)[:, None] * channels + column[None, :]
        value = tl.load(images + place, there, 0.0).to(tl.float32)
        if NORMALIZES:
            value = value * scale + shift
        take = there & ((value > best) | (value != value))  # NaN stays
        best = tl.where(take, value, best)
        which = tl.where(take, tap, which)
    which = tl.where(best <= 0, NOWHERE, which)
    best = tl.where(best < 0, 0.0, best)
    place = row.to(tl.int64)[:, None] * channels + column[None, :]
    tl.store(output + place, best.to(output.dtype.element_ty), (row < rows)[:, None])
    tl.store(places + place, which.to(tl.uint8), (row < rows)[:, None])


def largest(images: Tensor, pools: Pools, stats: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ReLU and max pooling by (kernel, stride, padding) of images (n, channels, h, w).

    Gives the pooled images, and which of its window each pixel was (uint8), NOWHERE where it is 0. With
    `stats` (4, channels) of `batch_norm` the images are scaled and shifted first.
    """
    kernel, stride, padding = pools
    images = in_rows(images)
    count, channels, height, width = images.shape
    sides = [(side + 2 * padding - kernel) // stride + 1 for side in (height, width)]
    output = torch.empty(
        (count, channels, *sides), dtype=images.dtype, device=images.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    places = like(output, dtype=torch.uint8)
    rows = count * sides[0] * sides[1]
    grid, constants = tiles(rows, channels, ELEMENTS // 2)
    with torch.cuda.device_of(images):
        _largest[grid](
            images, stats, output, places, rows, channels, height, width, *sides, **constants, KERNEL=kernel,
            STRIDE=stride, PADDING=padding, NORMALIZES=stats is not None,
        )  # fmt: skip
    return output, places


@triton.jit
def gathered(
    gradient, places, row, there, column, channels, height, width, pooled_height, pooled_width,
    TALL: tl.constexpr, WIDE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """The gradient (TALL, WIDE) of `largest`'s images in these rows and columns, by that of its output."""
    image, inner = row // (height * width), row % (height * width)
    y, x = inner // width + PADDING, inner % width + PADDING
    slope = tl.zeros([TALL, WIDE], tl.float32)
    # the windows that hold a pixel: as many each way as strides begin in a kernel
    EACH_WAY: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    for back in tl.static_range(EACH_WAY * EACH_WAY):
        down, right = y // STRIDE - back // EACH_WAY, x // STRIDE - back % EACH_WAY
        tap = (y - down * STRIDE) * KERNEL + x - right * STRIDE
        inside = there & (down >= 0) & (down < pooled_height) & (y - down * STRIDE < KERNEL)
        inside = (inside & (right >= 0) & (right < pooled_width) & (x - right * STRIDE < KERNEL))[:, None]
        window = ((image * pooled_height + down).to(tl.int64) * pooled_width + right)[:, None]
        window = window * channels + column[None, :]
        taken = tl.load(places + window, inside, NOWHERE).to(tl.int32) == tap[:, None]
        value = tl.load(gradient + window, inside, 0.0).to(tl.float32)
        slope += tl.where(taken & inside, value, 0.0)
    return slope


@triton.jit(do_not_specialize=ROWS)
def _back_to_places(
    gradient, places, output, sums, rows, rows_each, channels, height, width, pooled_height, pooled_width,
    TALL: tl.constexpr, WIDE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    first = tl.program_id(0) * rows_each
    total = tl.zeros([TALL, WIDE], tl.float32)
    for start in range(first, min(first + rows_each, rows), TALL):
        row = start + tl.arange(0, TALL)
        slope = gathered(
            gradient, places, row, row < rows, column, channels, height, width, pooled_height, pooled_width,
            TALL, WIDE, KERNEL, STRIDE, PADDING,
        )  # fmt: skip
        place = row.to(tl.int64)[:, None] * channels + column[None, :]
        tl.store(output + place, slope.to(output.dtype.element_ty), (row < rows)[:, None])
        total += slope
    tl.store(sums + tl.program_id(0) * channels + column, tl.sum(total, 0))


def back_to_places(
    gradient: Tensor, places: Tensor, height: int, width: int, pools: Pools
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The backward of `largest`: the gradient of its images (n, channels, height, width).

    And its sums over all but the channels (channels,), float32.
    """
    gradient = in_rows(gradient)
    kernel, stride, padding = pools
    count, channels, *sides = places.shape
    output = torch.empty(
        (count, channels, height, width), dtype=gradient.dtype, device=gradient.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    rows = count * height * width
    grid, constants, each = summing_tiles(rows, channels, ELEMENTS // 2)
    sums = torch.empty((grid[0], channels), device=gradient.device)
    with torch.cuda.device_of(gradient):
        _back_to_places[grid](
            gradient, places, output, sums, rows, each, channels, height, width, *sides, **constants,
            KERNEL=kernel, STRIDE=stride, PADDING=padding,
        )  # fmt: skip
    return output, sums.sum(0)


@triton.jit(do_not_specialize=["elements"])
def _pixels_of_blocks(
    images, output, elements, height, width, tall, wide, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    within, block = (element % DEPTH).to(tl.int32), (element // DEPTH).to(tl.int32)
    image, row = block // (tall * wide), block // wide % tall
    pixel, channel = within // CHANNELS, within % CHANNELS
    y, x = row * STRIDE + pixel // STRIDE - PADDING, block % wide * STRIDE + pixel % STRIDE - PADDING
    there = (element < elements) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    there = there & (pixel < STRIDE * STRIDE)
    place = ((image.to(tl.int64) * height + y) * width + x) * CHANNELS + channel
    value = tl.load(images + place, there, 0.0)
    tl.store(output + element, value.to(output.dtype.element_ty), element < elements)


def pixels_of_blocks(
    images: Tensor, sides: tuple[int, int], depth: int, stride: int, padding: int, dtype: torch.dtype
) -> Tensor:
    """Blocks of stride x stride pixels (n, channels, h, w) as pixels (n, *sides, depth), zeros around."""
    images = in_rows(images)
    count, channels, height, width = images.shape
    output = torch.empty((count, *sides, depth), dtype=dtype, device=images.device)
    with torch.cuda.device_of(images):
        _pixels_of_blocks[(triton.cdiv(output.numel(), ELEMENTS // 4),)](
            images, output, output.numel(), height, width, *sides, DEPTH=depth, CHANNELS=channels,
            STRIDE=stride, PADDING=padding, ELEMENTS=ELEMENTS // 4,
        )  # fmt: skip
    return output
