"""Batch norm, the summand of a residual block and ReLU in one: Triton kernels and their gradient.

As `gpu_kernels`: channels_last, float32 inside, sums in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from caltech_hpo.training import gpu_kernels
from caltech_hpo.training.gpu_kernels import (
    ROWS,
    Pools,
    gathered,
    largest,
    like,
    matrix,
    summing_tiles,
    tiles,
)

PARTS = 128  # partial sums that are added at a time
FEW = 16  # channels of a program that adds them
# What a batch is normalised with, a row each (channels,) float32.
MEAN, INVERSE, SCALE, SHIFT = range(4)


@triton.jit(do_not_specialize=ROWS)
def _moments(
    images, sums, rows, rows_each, channels, parts, TALL: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    first = tl.program_id(0) * rows_each
    # about a pixel of each channel: squares about 0 would leave little of a small variance
    about = tl.load(images + column).to(tl.float32)
    total = tl.zeros([TALL, WIDE], tl.float32)
    squares = tl.zeros([TALL, WIDE], tl.float32)
    for start in range(first, min(first + rows_each, rows), TALL):
        row = start + tl.arange(0, TALL)
        there = (row < rows)[:, None]
        value = tl.load(images + row.to(tl.int64)[:, None] * channels + column[None, :], there, 0.0)
        value = tl.where(there, value.to(tl.float32) - about[None, :], 0.0)
        total += value
        squares += value * value
    part = tl.program_id(0) * channels + column
    tl.store(sums + part, tl.sum(total, 0))
    tl.store(sums + parts * channels + part, tl.sum(squares, 0))


@triton.jit
def _added(sums, column, channels, parts, PARTS: tl.constexpr, FEW: tl.constexpr):
    total = tl.zeros([PARTS, FEW], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(sums + part[:, None] * channels + column[None, :], (part < parts)[:, None], 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["rows", "parts"])
def _statistics(
    images, sums, weight, bias, running_mean, running_variance, counted, stats, rows, channels, parts,
    epsilon, momentum, PARTS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * FEW + tl.arange(0, FEW)
    offset = _added(sums, column, channels, parts, PARTS, FEW) / rows
    squares = _added(sums + parts * channels, column, channels, parts, PARTS, FEW) / rows
    variance = squares - offset * offset
    variance = tl.where(variance < 0, 0.0, variance)  # NaN stays
    mean = tl.load(images + column).to(tl.float32) + offset
    inverse = 1 / tl.sqrt(variance + epsilon)
    scale = tl.load(weight + column) * inverse
    tl.store(stats + column, mean)
    tl.store(stats + channels + column, inverse)
    tl.store(stats + 2 * channels + column, scale)
    tl.store(stats + 3 * channels + column, tl.load(bias + column) - mean * scale)
    before = tl.load(running_mean + column)
    tl.store(running_mean + column, before + momentum * (mean - before))
    before = tl.load(running_variance + column)
    unbiased = variance * (rows / (rows - 1.0))
    tl.store(running_variance + column, before + momentum * (unbiased - before))
    if tl.program_id(0) == 0:
        tl.store(counted, tl.load(counted) + 1)


@triton.jit(do_not_specialize=["rows"])
def _normalized(
    images, summand, output, stats, rows, channels, TALL: tl.constexpr, WIDE: tl.constexpr,
    ADDS: tl.constexpr, RECTIFIES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    place = row.to(tl.int64)[:, None] * channels + column[None, :]
    there = (row < rows)[:, None]
    scale = tl.load(stats + 2 * channels + column)[None, :]
    shift = tl.load(stats + 3 * channels + column)[None, :]
    value = tl.load(images + place, there, 0.0).to(tl.float32) * scale + shift
    if ADDS:
        value += tl.load(summand + place, there, 0.0).to(tl.float32)
    if RECTIFIES:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    tl.store(output + place, value.to(output.dtype.element_ty), there)


@triton.jit(do_not_specialize=ROWS)
def _gradient_sums(
    gradient, images, kept, passed, stats, sums, rows, rows_each, channels, parts, height, width,
    pooled_height, pooled_width, TALL: tl.constexpr, WIDE: tl.constexpr, ADDS: tl.constexpr,
    RECTIFIES: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    mean = tl.load(stats + column)[None, :]
    scale = tl.load(stats + 2 * channels + column)[None, :]
    shift = tl.load(stats + 3 * channels + column)[None, :]
    first = tl.program_id(0) * rows_each
    total = tl.zeros([TALL, WIDE], tl.float32)
    along = tl.zeros([TALL, WIDE], tl.float32)
    for start in range(first, min(first + rows_each, rows), TALL):
        row = start + tl.arange(0, TALL)
        place = row.to(tl.int64)[:, None] * channels + column[None, :]
        there = (row < rows)[:, None]
        value = tl.load(images + place, there, 0.0).to(tl.float32)
        if KERNEL:
            slope = gathered(
                gradient, kept, row, row < rows, column, channels, height, width, pooled_height, pooled_width,
                TALL, WIDE, KERNEL, STRIDE, PADDING,
            )  # fmt: skip
        else:
            slope = tl.load(gradient + place, there, 0.0).to(tl.float32)
            if ADDS:  # what ReLU saw is in its output alone
                slope = tl.where(tl.load(kept + place, there, 0.0).to(tl.float32) > 0, slope, 0.0)
                tl.store(passed + place, slope.to(passed.dtype.element_ty), there)
            elif RECTIFIES:
                slope = tl.where(value * scale + shift > 0, slope, 0.0)
        total += slope
        along += slope * tl.where(there, value - mean, 0.0)
    part = tl.program_id(0) * channels + column
    tl.store(sums + part, tl.sum(total, 0))
    tl.store(sums + parts * channels + part, tl.sum(along, 0))


@triton.jit(do_not_specialize=["rows", "parts"])
def _coefficients(
    sums, stats, factors, slopes, rows, channels, parts, PARTS: tl.constexpr, FEW: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * FEW + tl.arange(0, FEW)
    total = _added(sums, column, channels, parts, PARTS, FEW)
    along = _added(sums + parts * channels, column, channels, parts, PARTS, FEW)
    inverse = tl.load(stats + channels + column)
    scale = tl.load(stats + 2 * channels + column)
    tl.store(slopes + column, along * inverse)
    tl.store(slopes + channels + column, total)
    # d images = scale * (slope - total / rows - (images - mean) * inverse^2 * along / rows)
    tl.store(factors + column, -scale * inverse * inverse * along / rows)
    tl.store(factors + channels + column, -scale * total / rows)


@triton.jit(do_not_specialize=["rows"])
def _image_gradient(
    gradient, images, kept, stats, factors, output, rows, channels, height, width, pooled_height,
    pooled_width, TALL: tl.constexpr, WIDE: tl.constexpr, RECTIFIES: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    place = row.to(tl.int64)[:, None] * channels + column[None, :]
    there = (row < rows)[:, None]
    mean = tl.load(stats + column)[None, :]
    scale = tl.load(stats + 2 * channels + column)[None, :]
    value = tl.load(images + place, there, 0.0).to(tl.float32)
    if KERNEL:
        slope = gathered(
            gradient, kept, row, row < rows, column, channels, height, width, pooled_height, pooled_width,
            TALL, WIDE, KERNEL, STRIDE, PADDING,
        )  # fmt: skip
    else:
        slope = tl.load(gradient + place, there, 0.0).to(tl.float32)
        if RECTIFIES:
            shift = tl.load(stats + 3 * channels + column)[None, :]
            slope = tl.where(value * scale + shift > 0, slope, 0.0)
    steep, level = tl.load(factors + column)[None, :], tl.load(factors + channels + column)[None, :]
    slope = slope * scale + (value - mean) * steep + level
    tl.store(output + place, slope.to(output.dtype.element_ty), there)


class BatchNorm(torch.autograd.Function):
    """Batch norm of bf16 images by the batch's own statistics, in training.

    `apply(images, summand, weight, bias, running_mean, running_var, counted, epsilon, momentum, rectifies,
    pools)`: then the summand (or None) is added, ReLU and max pooling computed, where `rectifies` and `pools`
    (not with a summand) say so. The running statistics and the count of batches are updated in place.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, summand: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor,
        running_variance: Tensor, counted: Tensor, epsilon: float, momentum: float, rectifies: bool,
        pools: Pools | None,
    ) -> Tensor:  # fmt: skip
        images = images.contiguous(memory_format=torch.channels_last)
        rows, channels = matrix(images)
        grid, constants, each = summing_tiles(rows, channels, gpu_kernels.ELEMENTS)
        sums = torch.empty((2, grid[0], channels), device=images.device)
        stats = torch.empty((4, channels), device=images.device)
        with torch.cuda.device_of(images):
            _moments[grid](images, sums, rows, each, channels, grid[0], **constants)
            _statistics[(channels // FEW,)](
                images, sums, weight, bias, running_mean, running_variance, counted, stats, rows, channels,
                grid[0], epsilon, momentum, PARTS=PARTS, FEW=FEW,
            )  # fmt: skip
        output, kept = normalized(images, summand, stats, rectifies=rectifies, pools=pools)
        ctx.save_for_backward(images, stats, kept)
        ctx.adds, ctx.rectifies, ctx.pools = summand is not None, rectifies, pools
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        images, stats, kept = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        rows, channels = matrix(images)
        kernel, stride, padding = ctx.pools or (0, 1, 0)
        grid, constants, each = summing_tiles(rows, channels, gpu_kernels.ELEMENTS)
        sums = torch.empty((2, grid[0], channels), device=images.device)
        factors, slopes = (torch.empty((2, channels), device=images.device) for _ in range(2))
        # what goes to the summand is what ReLU passes on
        passed = like(gradient) if ctx.adds and ctx.rectifies else gradient
        found = like(images)
        places = (*images.shape[2:], *gradient.shape[2:])
        with torch.cuda.device_of(images):
            _gradient_sums[grid](
                gradient, images, kept, passed, stats, sums, rows, each, channels, grid[0], *places,
                **constants, ADDS=ctx.adds and ctx.rectifies, RECTIFIES=ctx.rectifies, KERNEL=kernel,
                STRIDE=stride, PADDING=padding,
            )  # fmt: skip
            _coefficients[(channels // FEW,)](
                sums, stats, factors, slopes, rows, channels, grid[0], PARTS=PARTS, FEW=FEW
            )
            grid, constants = tiles(rows, channels, gpu_kernels.ELEMENTS)
            _image_gradient[grid](
                passed, images, kept, stats, factors, found, rows, channels, *places, **constants,
                RECTIFIES=ctx.rectifies and not ctx.adds, KERNEL=kernel, STRIDE=stride, PADDING=padding,
            )  # fmt: skip
        return found, passed if ctx.adds else None, slopes[0], slopes[1], *[None] * 7


def normalized(
    images: Tensor, summand: Tensor | None, stats: Tensor, *, rectifies: bool, pools: Pools | None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Images (n, channels, h, w) scaled and shifted by `stats` (4, channels), then summand, ReLU, pooling.

    And what the gradient needs of the result: which pixels were the largest, or where ReLU passed a sum on.
    """
    if pools:
        return largest(images, pools, stats)
    rows, channels = matrix(images)
    if summand is not None:
        summand = summand.contiguous(memory_format=torch.channels_last)
    output = like(images)
    grid, constants = tiles(rows, channels, gpu_kernels.ELEMENTS)
    with torch.cuda.device_of(images):
        _normalized[grid](
            images, summand, output, stats, rows, channels, **constants, ADDS=summand is not None,
            RECTIFIES=rectifies,
        )  # fmt: skip
    return output, output if summand is not None and rectifies else None
