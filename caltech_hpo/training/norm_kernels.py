"""Triton kernels of batch norm, with the summand of a residual block, ReLU and max pooling.

As `gpu_kernels`: channels_last, float32 inside, sums in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from caltech_hpo.training.gpu_kernels import ROWS, gathered

PARTS = 128  # partial sums that are added at a time
FEW = 16  # channels of a program that adds them
# `stats` is what a batch is normalised with, (4, channels) float32: mean, 1 / standard deviation, and the
# scale and shift that follow from them.


@triton.jit(do_not_specialize=[*ROWS, "parts"])
def moments_kernel(
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
def statistics_kernel(
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
def normalized_kernel(
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


@triton.jit(do_not_specialize=[*ROWS, "parts"])
def gradient_sums_kernel(
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
                slope = tl.where(tl.load(kept + place, there, 0.0).to(tl.float32) <= 0, 0.0, slope)
                tl.store(passed + place, slope.to(passed.dtype.element_ty), there)
            elif RECTIFIES:
                slope = tl.where(value * scale + shift <= 0, 0.0, slope)  # NaN stays
        total += slope
        along += slope * tl.where(there, value - mean, 0.0)
    part = tl.program_id(0) * channels + column
    tl.store(sums + part, tl.sum(total, 0))
    tl.store(sums + parts * channels + part, tl.sum(along, 0))


@triton.jit(do_not_specialize=["rows", "parts"])
def coefficients_kernel(
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
def image_gradient_kernel(
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
            slope = tl.where(value * scale + shift <= 0, 0.0, slope)  # NaN stays
    steep, level = tl.load(factors + column)[None, :], tl.load(factors + channels + column)[None, :]
    slope = slope * scale + (value - mean) * steep + level
    tl.store(output + place, slope.to(output.dtype.element_ty), there)
