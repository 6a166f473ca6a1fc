"""SGD that leaves large linear layers their weights in bf16, which each forward pass would cast again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from caltech_hpo.data.kernel_check import kernels_run
from caltech_hpo.training.linear import CudaLinear

VELOCITY = "momentum_buffer"  # torch's name, so that either takes the other's state


class CudaSGD(torch.optim.SGD):
    """torch's fused SGD; the weights of some layers are stepped, and cast for the next pass, by one kernel.

    Of 30 bytes a weight that a step moves beside its products, casting takes 6 and this kernel 2.
    """

    def __init__(self, groups: Any, layers: Sequence[CudaLinear], **options: Any) -> None:
        """`options` are those of torch.optim.SGD, without dampening and maximize."""
        super().__init__(groups, **options)
        self._layers = {id(layer.weight): layer for layer in layers}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step by the gradients that there are."""
        stepped: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for weight in group["params"]:
                layer = self._layers.get(id(weight))
                if layer is not None and weight.grad is not None:
                    self._step(layer, weight.grad, group)
                    stepped.append((weight, weight.grad))
                    weight.grad = None  # torch's step leaves it out
        super().step()
        for weight, gradient in stepped:
            weight.grad = gradient

    def _step(self, layer: CudaLinear, gradient: Tensor, group: dict[str, Any]) -> None:
        from caltech_hpo.training.sgd_kernel import sgd_step

        weight, rate, velocity = layer.weight, group["lr"], None
        if group["momentum"]:
            velocity = self.state[weight].get(VELOCITY)
            if velocity is None:
                velocity = self.state[weight][VELOCITY] = torch.zeros_like(weight)
        if not isinstance(rate, Tensor):
            rate = torch.full((), rate, device=weight.device)
        if layer.small is None:
            layer.small = torch.empty_like(weight, dtype=torch.bfloat16)
        sgd_step(
            weight, gradient.contiguous(), velocity, layer.small, rate, momentum=group["momentum"],
            decay=group["weight_decay"], nesterov=group["nesterov"],
        )  # fmt: skip
        increment_version(weight)
        layer.small_version = weight._version


def layers_to_step(model: nn.Module) -> list[CudaLinear]:
    """The model's layers that CudaSGD is for; none where kernels do not run. Forgets what another optimizer
    left in them."""
    found = [module for module in model.modules() if isinstance(module, CudaLinear)]
    for layer in found:
        layer.small = None
    return [layer for layer in found if layer.weight.requires_grad and kernels_run(layer.weight.device)]
