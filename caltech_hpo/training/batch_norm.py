"""Batch norm, with the summand of a residual block, ReLU and max pooling, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from caltech_hpo.training.gpu_kernels import (
    ELEMENTS,
    Pools,
    in_rows,
    largest,
    like,
    matrix,
    summing_tiles,
    tiles,
)
from caltech_hpo.training.norm_kernels import (
    FEW,
    PARTS,
    coefficients_kernel,
    gradient_sums_kernel,
    image_gradient_kernel,
    moments_kernel,
    normalized_kernel,
    statistics_kernel,
)


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
        images = in_rows(images)
        rows, channels = matrix(images)
        grid, constants, each = summing_tiles(rows, channels, ELEMENTS)
        sums = torch.empty((2, grid[0], channels), device=images.device)
        stats = torch.empty((4, channels), device=images.device)
        with torch.cuda.device_of(images):
            moments_kernel[grid](images, sums, rows, each, channels, grid[0], **constants)
            statistics_kernel[(channels // FEW,)](
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
        gradient = in_rows(gradient)
        rows, channels = matrix(images)
        kernel, stride, padding = ctx.pools or (0, 1, 0)
        grid, constants, each = summing_tiles(rows, channels, ELEMENTS)
        sums = torch.empty((2, grid[0], channels), device=images.device)
        factors, slopes = (torch.empty((2, channels), device=images.device) for _ in range(2))
        # what goes to the summand is what ReLU passes on
        passed = like(gradient) if ctx.adds and ctx.rectifies else gradient
        found = like(images)
        places = (*images.shape[2:], *gradient.shape[2:])
        with torch.cuda.device_of(images):
            gradient_sums_kernel[grid](
                gradient, images, kept, passed, stats, sums, rows, each, channels, grid[0], *places,
                **constants, ADDS=ctx.adds and ctx.rectifies, RECTIFIES=ctx.rectifies, KERNEL=kernel,
                STRIDE=stride, PADDING=padding,
            )  # fmt: skip
            coefficients_kernel[(channels // FEW,)](
                sums, stats, factors, slopes, rows, channels, grid[0], PARTS=PARTS, FEW=FEW
            )
            grid, constants = tiles(rows, channels, ELEMENTS)
            image_gradient_kernel[grid](
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
    images = in_rows(images)
    rows, channels = matrix(images)
    if summand is not None:
        summand = in_rows(summand)
    output = like(images)
    grid, constants = tiles(rows, channels, ELEMENTS)
    with torch.cuda.device_of(images):
        normalized_kernel[grid](
            images, summand, output, stats, rows, channels, **constants, ADDS=summand is not None,
            RECTIFIES=rectifies,
        )  # fmt: skip
    return output, output if summand is not None and rectifies else None
