"""Linear layers whose weights' gradients come in float32, as the optimizer wants them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from caltech_hpo.training.fused_norms import runs_fused

LARGE = 1 << 20  # weights: of fewer the passes cost nothing


class CudaLinear(nn.Linear):
    """A linear layer, for bf16 autocast on a GPU; elsewhere the plain one.

    `small` is the weight in bf16, where the optimizer writes that too, of the weight's `small_version`:
    whatever else changes the weight makes it stale (but another fused optimizer, which changes no version).
    """

    small: Tensor | None = None
    small_version = 0

    def forward(self, input: Tensor) -> Tensor:
        """(n, out_features) of (n, in_features)."""
        if not runs_fused(input):
            return super().forward(input)
        features = input.to(torch.get_autocast_dtype("cuda"))
        small = self._small(features.dtype)
        if self.weight.requires_grad and torch.is_grad_enabled():
            output: Tensor = _Linear.apply(features, self.weight, self.bias, small)
            return output
        return functional.linear(features, small, self.bias.to(features.dtype))

    def _small(self, dtype: torch.dtype) -> Tensor:
        small = self.small
        if small is not None and small.dtype == dtype and self.small_version == self.weight._version:
            return small
        return self.weight.detach().to(dtype)


class _Linear(torch.autograd.Function):
    """torch would write the gradient in bf16, and read it to write it in float32."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, small: Tensor) -> Tensor:
        ctx.save_for_backward(features, small)
        return functional.linear(features, small, bias.to(features.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        features, small = ctx.saved_tensors
        to_features = gradient @ small if ctx.needs_input_grad[0] else None
        to_weight = torch.mm(gradient.t(), features, out_dtype=torch.float32)
        return to_features, to_weight, gradient.sum(0, dtype=torch.float32), None


def widen_gradients(model: nn.Module) -> None:
    """Makes CudaLinear of the large linear layers that have a bias."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is not None and module.weight.numel() >= LARGE:
            module.__class__ = CudaLinear
