"""What a training takes of the memory: counted from a forward pass, not allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from caltech_hpo.spec import Recipe
from caltech_hpo.training.device import autocast, resolve_precision, try_algorithms
from caltech_hpo.training.freezing import training_mode
from caltech_hpo.training.prepare import Prepared
from caltech_hpo.training.sources import FeatureSource

# A batch, the one before it, and what augmentation makes on the way.
BATCHES_ALIVE = 4
# What counting misses on a CPU: what is made and freed on the way, gaps in the kept memory, and libraries'
# scratch (bytes at most, and at most as much as a model and its step; a head alone has none). 24 kinds of
# training of five architectures (1 to 256 images at a time, bf16 and fp32), each scored and saved thrice,
# took 0.38 to 0.97 of the estimate.
MARGIN, SCRATCH = 1.8, 1 << 28
# What frozen layers take while they run, as a multiple of what the largest of them takes and gives.
PASSING = 1.5


def saved_bytes(model: nn.Module, inputs: Tensor) -> int:
    """What a forward pass keeps for the backward pass, each tensor once, parameters and input left out."""
    parameters = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> None:
        root: Any = tensor if tensor._base is None else tensor._base
        if id(root) not in parameters:
            kept[id(root)] = root

    def unpack(_: None) -> Tensor:
        raise AssertionError("there is no backward pass")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        model(inputs)
    total = sum(tensor.nbytes for tensor in kept.values() if tensor is not inputs)
    # They know the graph, which knows `pack`, which knows them: nobody would ever free that circle.
    kept.clear()
    return total


@contextlib.contextmanager
def _passed_bytes(model: nn.Module) -> Iterator[list[int]]:
    """What each layer that is called takes and gives: all that a frozen one needs, and only while it runs."""
    passed: list[int] = []

    def called(_: nn.Module, taken: tuple[Any, ...], given: Any) -> None:
        passed.append(sum(one.nbytes for one in (*taken, given) if isinstance(one, Tensor)))

    layers = (module for module in model.modules() if not any(module.children()))
    hooks = [layer.register_forward_hook(called) for layer in layers]
    try:
        yield passed
    finally:
        for hook in hooks:
            hook.remove()


def state_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """What a training keeps of its weights beside them: gradients, optimizer state, averages, bf16 copies.

    One more copy of what learns is for the optimizer's step, and one is the best epoch's.
    """
    learning = learning_bytes(prepared.model)
    every = model_bytes(prepared.runs)
    copies = 5 if recipe.optimizer == "adamw" else 4
    total = copies * learning + (2 * learning if recipe.ema else 0)
    return total + (every // 2 if resolve_precision(recipe.precision, prepared.device) == "bf16" else 0)


def model_bytes(model: nn.Module) -> int:
    """The bytes of its parameters."""
    return sum(p.nbytes for p in model.parameters())


def learning_bytes(model: nn.Module) -> int:
    """The bytes of what learns; its gradients take as many."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def needed_bytes(recipe: Recipe, prepared: Prepared) -> Callable[[int], int]:
    """An estimate of a CPU training's peak with its model, for how many images are computed at a time."""
    (two, _), (three, passed) = (_step_bytes(recipe, prepared, count) for count in (2, 3))
    each, batches = max(three - two, PASSING * passed / 3), batch_bytes(recipe, prepared)
    model, state = model_bytes(prepared.model), state_bytes(recipe, prepared)
    # a piece's gradient of a layer is there before it is added to those of the pieces before it
    added = max((p.nbytes for p in prepared.model.parameters() if p.requires_grad), default=0)
    most_scratch = 0 if isinstance(prepared.training, FeatureSource) else SCRATCH

    def needed(images: int) -> int:
        step = batches + images * each
        pieces = added if images < recipe.batch_size else 0
        return int(model + state + MARGIN * step + pieces + min(most_scratch, model + step))

    return needed


def batch_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """What the batches take that are alive at a time; those of images are made in float32."""
    example = prepared.training.example(1)
    made = example if isinstance(prepared.training, FeatureSource) else example.float()
    return BATCHES_ALIVE * recipe.batch_size * made.nbytes


def _step_bytes(recipe: Recipe, prepared: Prepared, images: int) -> tuple[int, int]:
    """What a step keeps for its backward pass, and the most that a layer takes and gives."""
    precision = resolve_precision(recipe.precision, prepared.device)
    training_mode(prepared.runs, prepared.prefix)
    try_algorithms(wanted=False)
    with (
        unchanged(prepared), autocast(prepared.device, precision), _passed_bytes(prepared.runs) as passed,
    ):  # fmt: skip
        return saved_bytes(prepared.runs, prepared.training.example(images)), max(passed, default=0)


@contextlib.contextmanager
def unchanged(prepared: Prepared) -> Iterator[None]:
    """Puts back what a forward pass changes: batch statistics, gradients, random states."""
    device = prepared.device
    buffers = [(buffer, buffer.clone()) for buffer in prepared.runs.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            for parameter in prepared.model.parameters():
                parameter.grad = None
