"""Batch norms that add a residual block's summand and compute the ReLU after them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from caltech_hpo.data.kernel_check import kernels_run

LEAST_CHANNELS = 16  # that the kernels take; of more, whole multiples
LARGEST_WINDOW = 15  # a side's pixels: which of a window's was the largest is kept in a byte


def runs_fused(images: Tensor) -> bool:
    """Whether images are computed in bf16 autocast on a GPU, for which the fused modules are."""
    return images.is_cuda and torch.is_autocast_enabled("cuda") and images.dtype != torch.float64


class Passed(nn.ReLU):
    """A ReLU that what stands before it has computed."""

    def forward(self, input: Tensor) -> Tensor:
        """Its input."""
        return input


class PassedPool(nn.MaxPool2d):
    """A max pooling that what stands before it has computed."""

    def forward(self, input: Tensor) -> Tensor:
        """Its input."""
        return input


def plain_pooling(module: Any) -> tuple[int, int, int] | None:
    """(kernel, stride, padding) of a max pooling of square windows, None of anything else."""
    if type(module) is not nn.MaxPool2d or module.dilation != 1 or module.ceil_mode or module.return_indices:
        return None
    kernel, stride, padding = module.kernel_size, module.stride, module.padding
    if not (isinstance(kernel, int) and isinstance(stride, int) and isinstance(padding, int)):
        return None
    return (kernel, stride, padding) if kernel < LARGEST_WINDOW else None


class CudaBatchNorm2d(nn.BatchNorm2d):
    """Batch norm, for bf16 autocast on a GPU; elsewhere the plain one.

    With ReLU if it `rectifies`, and then with the max pooling of (kernel, stride, padding) `pools`.
    """

    rectifies: bool = False
    pools: tuple[int, int, int] | None = None

    def forward(self, input: Tensor, summand: Tensor | None = None) -> Tensor:
        """Of images (n, channels, h, w), the summand of their shape added before the ReLU."""
        if not self._fuses(input, summand):
            output = super().forward(input)
            output = output if summand is None else output + summand
            output = functional.relu(output) if self.rectifies else output
            return functional.max_pool2d(output, *self.pools) if self.pools else output
        from caltech_hpo.training.batch_norm import BatchNorm, normalized

        if self.training:
            fused: Tensor = BatchNorm.apply(
                input, summand, self.weight, self.bias, self.running_mean, self.running_var,
                self.num_batches_tracked, self.eps, self.momentum, self.rectifies, self.pools,
            )  # fmt: skip
            return fused
        assert self.running_mean is not None and self.running_var is not None, "it fuses"
        inverse = (self.running_var + self.eps).rsqrt()
        scale = self.weight * inverse
        stats = torch.stack([self.running_mean, inverse, scale, self.bias - self.running_mean * scale])
        return normalized(input, summand, stats, rectifies=self.rectifies, pools=self.pools)[0]

    def _fuses(self, input: Tensor, summand: Tensor | None) -> bool:
        if not runs_fused(input) or input.dtype != torch.get_autocast_dtype("cuda"):
            return False
        if self.weight is None or self.running_mean is None or self.momentum is None:
            return False
        one_value = input.numel() <= self.num_features  # in training torch says what is amiss
        if self.num_features % LEAST_CHANNELS or one_value:
            return False
        enters = (input, summand, self.weight, self.bias)
        learns = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in enters)
        return (self.training or not learns) and kernels_run(input.device)


class CudaBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's, its sum and ReLU left to the batch norms."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w)."""
        output = self.conv2(self.bn1(self.conv1(x)))
        return self.bn2(output, x if self.downsample is None else self.downsample(x))  # type: ignore[no-any-return]


class CudaBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's, its sum and ReLU left to the batch norms."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w)."""
        output = self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        return self.bn3(output, x if self.downsample is None else self.downsample(x))  # type: ignore[no-any-return]


BLOCKS: dict[type, type] = {BasicBlock: CudaBasicBlock, Bottleneck: CudaBottleneck}


def fuse_norms(model: nn.Module) -> None:
    """Changes batch norms in place, and what runs them: names, parameters and state stay."""
    once = used_once(model)
    for module in list(model.modules()):
        norms = [child for child in module.children() if type(child) is nn.BatchNorm2d]
        if type(module) in BLOCKS and len(norms) == (2 if type(module) is BasicBlock else 3):
            module.__class__ = BLOCKS[type(module)]
            for norm in norms:
                _fuse(norm, rectifies=True)
        elif type(module) is ResNet:
            _fuse_row([module.conv1, module.bn1, module.relu, module.maxpool], once)
        elif type(module) is nn.Sequential:
            _fuse_row(list(module), once)


def used_once(model: nn.Module) -> set[int]:
    """The ids of the modules that stand in one place: what is changed of another, changes elsewhere too."""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    return {module for module, count in places.items() if count == 1}


def _fuse_row(modules: list[Any], once: set[int]) -> None:
    """Of modules that run one after another."""
    rows: Any = zip(modules, [*modules[1:], None], [*modules[2:], None, None], strict=False)
    for norm, relu, pooling in rows:
        if type(norm) is not nn.BatchNorm2d or id(norm) not in once:
            continue
        rectifies = type(relu) is nn.ReLU and id(relu) in once
        pools = plain_pooling(pooling) if rectifies and id(pooling) in once else None
        _fuse(norm, rectifies=rectifies, pools=pools)
        if rectifies:
            relu.__class__ = Passed
        if pools:
            pooling.__class__ = PassedPool


def _fuse(norm: Any, *, rectifies: bool, pools: tuple[int, int, int] | None = None) -> None:
    norm.__class__ = CudaBatchNorm2d
    norm.rectifies, norm.pools = rectifies, pools
