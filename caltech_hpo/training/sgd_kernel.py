"""A Triton kernel of one SGD step: it writes the weights in float32 and, in the same pass, in bf16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # weights that a program steps
WARPS = 8


@triton.jit
def _stepped(
    weight, gradient, velocity, small, rate, elements, momentum, decay,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    there = place < elements
    value = tl.load(weight + place, there)
    slope = tl.load(gradient + place, there) + decay * value
    if MOMENTUM:
        kept = momentum * tl.load(velocity + place, there) + slope
        tl.store(velocity + place, kept, there)
        slope = slope + momentum * kept if NESTEROV else kept
    value -= tl.load(rate) * slope
    tl.store(weight + place, value, there)
    tl.store(small + place, value.to(small.dtype.element_ty), there)


def sgd_step(
    weight: Tensor, gradient: Tensor, velocity: Tensor | None, small: Tensor, rate: Tensor, *,
    momentum: float, decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """Steps `weight` and, if given, `velocity` (zeros before the first step) as torch.optim.SGD does.

    All are contiguous, of one shape and float32; `small`, of another dtype, gets what `weight` is then. The
    `rate` is 0-dimensional. Autograd does not see it.
    """
    elements = weight.numel()
    kept = weight if velocity is None else velocity  # not looked at then
    with torch.cuda.device_of(weight):
        _stepped[(triton.cdiv(elements, ELEMENTS),)](
            weight, gradient, kept, small, rate, elements, momentum, decay, MOMENTUM=velocity is not None,
            NESTEROV=nesterov, ELEMENTS=ELEMENTS, num_warps=WARPS,
        )  # fmt: skip
