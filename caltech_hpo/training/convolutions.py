"""Convolutions that compute what torch's do, in a way that the device is faster at.

They take the place of a model's own, under the same names and with the same parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from caltech_hpo.data.kernel_check import kernels_run
from caltech_hpo.terms import TIMM, Precision
from caltech_hpo.training.fused_norms import (
    LEAST_CHANNELS,
    Passed,
    PassedPool,
    fuse_norms,
    plain_pooling,
    runs_fused,
    used_once,
)
from caltech_hpo.training.linear import widen_gradients

TENSOR_CORE_CHANNELS = 8  # cuDNN pads fewer of them, or a number between, with a copy of its own


def choose_convolutions(
    model: nn.Module, architecture: str, device: torch.device, precision: Precision
) -> None:  # fmt: skip
    """Changes the model's convolutions in place; nothing happens in fp32. The precision must be resolved."""
    if precision != "bf16":
        return
    if device.type == "cpu":
        train_depthwise_in_fp32(model)
    # what else uses a ReLU of one of timm's thousand models is not known
    if device.type == "cuda" and not architecture.startswith(TIMM):
        fuse_with_relu(model)
        fuse_norms(model)
        widen_gradients(model)


class _LearnsInFp32:
    """A convolution that leaves bf16 autocast where its gradient will be needed."""

    def forward(self: Any, images: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not (images.requires_grad or self.weight.requires_grad):
            return super().forward(images)  # type: ignore[misc,no-any-return]
        with torch.autocast(images.device.type, enabled=False):
            return super().forward(images.float())  # type: ignore[misc,no-any-return]


def train_depthwise_in_fp32(model: nn.Module) -> None:
    """Keeps depthwise convolutions that learn out of bf16, for a CPU.

    oneDNN's bf16 gradient of a depthwise convolution is slow: a training step of EfficientNet-Lite0's
    last stages took 0.83 s with it and 0.37 s without (batch 64, 2 cores with AVX512-BF16).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            kind = type(module)
            if not issubclass(kind, _LearnsInFp32):
                module.__class__ = type(f"{kind.__name__}LearningInFp32", (_LearnsInFp32, kind), {})


class CudaConv2d(nn.Conv2d):
    """A convolution, with its ReLU if it `rectifies`, for bf16 autocast on a GPU; elsewhere the plain one.

    And with the max pooling after that, of (kernel, stride, padding) `pools`. Strided ones of few channels
    take their stride's blocks of pixels as channels (see `space_to_depth`).
    """

    rectifies: bool = False
    pools: tuple[int, int, int] | None = None
    takes_blocks: bool = False
    fusing: bool = True  # until cuDNN refuses to

    def forward(self, input: Tensor) -> Tensor:
        """(n, out_channels, ...) of images (n, in_channels, height, width)."""
        if not runs_fused(input):
            return self._then(super().forward(input))
        dtype = torch.get_autocast_dtype("cuda")
        weight = self.weight.to(dtype)
        stride, padding = self.stride, self.padding
        if self.takes_blocks and not input.requires_grad:
            images, weight = space_to_depth(input, weight, stride[0], int(padding[0]))
            stride, padding = (1, 1), (0, 0)
        else:
            images = input.to(dtype)
        if self.rectifies and self.fusing and self.bias is not None:
            kernels = kernels_run(input.device) and self.out_channels % LEAST_CHANNELS == 0
            pools = self.pools if kernels else None
            try:
                fused: Tensor = _ConvolutionReLU.apply(
                    images, weight, self.bias, stride, padding, pools, kernels
                )
                return fused if pools or not self.pools else functional.max_pool2d(fused, *self.pools)
            except torch.OutOfMemoryError:  # unfused, it would keep more
                raise
            except RuntimeError:  # no engine of this cuDNN on this GPU, or for want of memory
                self.fusing = False
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._then(functional.conv2d(images, weight, bias, stride, padding))

    def _then(self, output: Tensor) -> Tensor:
        output = functional.relu(output) if self.rectifies else output
        return functional.max_pool2d(output, *self.pools) if self.pools else output


def fuse_again(model: nn.Module) -> None:
    """Lets cuDNN be asked once more, where it may have refused for lack of memory."""
    for module in model.modules():
        if isinstance(module, CudaConv2d):
            module.fusing = True


class _ConvolutionReLU(torch.autograd.Function):
    """Convolution, bias and ReLU in one kernel (torch computes three, each a pass over the memory), then
    max pooling where `pools` says so: what it forgets need not be kept. `bias` is float32."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int],
        padding: tuple[int, int], pools: tuple[int, int, int] | None, kernels: bool,
    ) -> Tensor:  # fmt: skip
        small = bias.to(weight.dtype)
        output: Tensor = torch.cudnn_convolution_relu(images, weight, small, stride, padding, (1, 1), 1)
        ctx.stride, ctx.padding, ctx.pools, ctx.kernels = stride, padding, pools, kernels
        if pools:
            from caltech_hpo.training.gpu_kernels import largest

            ctx.sides = output.shape[2:]
            output, places = largest(output, pools)
            ctx.save_for_backward(images, weight, places)
        else:
            ctx.save_for_backward(images, weight, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        images, weight, kept = ctx.saved_tensors
        if ctx.kernels:
            from caltech_hpo.training.gpu_kernels import back_to_places, relu_gradient

            if ctx.pools:
                height, width = ctx.sides
                gradient, sums = back_to_places(gradient, kept, height, width, ctx.pools)
            else:
                gradient, sums = relu_gradient(gradient, kept)
        else:
            gradient = torch.ops.aten.threshold_backward(gradient, kept, 0)
            sums = gradient.sum((0, 2, 3), dtype=torch.float32)
        to_images, to_weight, _ = torch.ops.aten.convolution_backward(
            gradient, images, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1,
            [*ctx.needs_input_grad[:2], False],
        )  # fmt: skip
        return to_images, to_weight, sums, *[None] * 4


def fuse_with_relu(model: nn.Module) -> None:
    """Makes CudaConv2d of what precedes a ReLU in a sequence, and of strided convolutions of few channels."""
    modules: list[Any] = list(model.modules())
    once = used_once(model)
    for parent in modules:
        children: list[Any] = list(parent) if type(parent) is nn.Sequential else []
        for module, relu, pooling in zip(children, children[1:], [*children[2:], None], strict=False):
            alone = id(module) in once and id(relu) in once
            if alone and _is_plain(module) and module.bias is not None and type(relu) is nn.ReLU:
                module.__class__, relu.__class__ = CudaConv2d, Passed
                module.rectifies = True
                if id(pooling) in once and (pools := plain_pooling(pooling)) is not None:
                    pooling.__class__, module.pools = PassedPool, pools
    for module in modules:
        if _is_plain(module) and _takes_blocks(module):
            module.__class__ = CudaConv2d
            module.takes_blocks = True


def _is_plain(module: Any) -> bool:
    if type(module) not in (nn.Conv2d, CudaConv2d) or isinstance(module.padding, str):
        return False
    return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"


def _takes_blocks(module: nn.Conv2d) -> bool:
    """Few channels, and an overlapping stride that is the same both ways."""
    square = all(len(set(side)) == 1 for side in (module.stride, module.padding, module.kernel_size))
    overlapping = 1 < module.stride[0] < module.kernel_size[0]
    return square and overlapping and module.in_channels < TENSOR_CORE_CHANNELS


def space_to_depth(images: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Images and weight of a convolution of stride 1 without padding that equals the strided one.

    Each block of stride x stride pixels becomes one pixel of stride * stride times the channels, padded
    with zeros to what tensor cores take: (n, 3, 224, 224) and (64, 3, 11, 11) become (n, 48, 57, 57) and
    (64, 48, 3, 3). Of the weight's type, channels_last.
    """
    channels, kernel = images.shape[1], weight.shape[2]
    blocks = -(-kernel // stride)  # a kernel's side, beyond the last pixel zeros
    depth = stride * stride * channels
    more = -depth % TENSOR_CORE_CHANNELS
    tall, wide = ((side + 2 * padding - kernel) // stride + blocks for side in images.shape[2:])
    if kernels_run(images.device):
        from caltech_hpo.training.gpu_kernels import pixels_of_blocks

        pixels = pixels_of_blocks(images, (tall, wide), depth + more, stride, padding, weight.dtype)
    else:
        pixels = functional.pad(_blocks(images, tall, wide, stride, padding, weight.dtype), (0, more))
    rest = blocks * stride - kernel
    taps = functional.pad(weight, (0, rest, 0, rest))
    taps = taps.view(-1, channels, blocks, stride, blocks, stride).permute(0, 2, 4, 3, 5, 1)
    taps = functional.pad(taps.reshape(-1, blocks, blocks, depth), (0, more))
    return pixels.permute(0, 3, 1, 2), taps.permute(0, 3, 1, 2)


def _blocks(
    images: Tensor, tall: int, wide: int, stride: int, padding: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """(n, tall, wide, stride * stride * channels)."""
    count, channels, height, width = images.shape
    padded = images.new_zeros((count, tall * stride, wide * stride, channels), dtype=dtype)
    rows, columns = min(height, tall * stride - padding), min(width, wide * stride - padding)
    inner = images.permute(0, 2, 3, 1)[:, :rows, :columns]
    padded[:, padding : padding + rows, padding : padding + columns] = inner
    pixels = padded.view(count, tall, stride, wide, stride, channels).transpose(2, 3)
    return pixels.reshape(count, tall, wide, stride * stride * channels)
