"""Weight averaging: an exponential moving average of everything that learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The moving average of a module's trained parameters and float buffers.

    The decay begins low, min(decay, (1 + step) / (10 + step)), so that the first random weights are
    soon forgotten (as in TensorFlow's ExponentialMovingAverage). `swap` exchanges averages and weights
    in place: between two calls the module computes with the averages.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """`decay` in (0, 1), a step."""
        self._decay = decay
        self._steps = 0
        self._weights: list[Tensor] = [p.detach() for p in module.parameters() if p.requires_grad]
        self._weights += [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self._averages = [weight.clone() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after an optimizer step into the average."""
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        get_ema_multi_avg_fn(decay)(self._averages, self._weights, self._steps)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges averages and weights in place."""
        kept = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        torch._foreach_copy_(self._averages, kept)
