"""Weight averaging: an exponential moving average of everything that learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The moving average of a module's trained parameters and float buffers.

    The decay begins low, min(decay, (1 + step) / (10 + step)), so that the first random weights are
    soon forgotten (as in TensorFlow's ExponentialMovingAverage). `swap` exchanges averages and weights
    in place: between two calls (`swapped`) the module computes with the averages.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """`decay` in (0, 1), a step."""
        self._decay = decay
        self.steps = 0
        self.swapped = False
        self._weights: list[Tensor] = [p.detach() for p in module.parameters() if p.requires_grad]
        self._weights += [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self.averages = [weight.clone() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after an optimizer step into the average."""
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        get_ema_multi_avg_fn(decay)(self.averages, self._weights, self.steps)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges averages and weights in place."""
        kept = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self.averages)
        torch._foreach_copy_(self.averages, kept)
        self.swapped = not self.swapped

    @torch.no_grad()
    def load(self, averages: list[Tensor], steps: int) -> None:
        """Continues from averages after so many steps."""
        for own, value in zip(self.averages, averages, strict=True):
            own.copy_(value)
        self.steps = steps
