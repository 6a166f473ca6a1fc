"""How many images are computed at a time: as many of a batch as the memory holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from caltech_hpo.spec import Recipe
from caltech_hpo.training.convolutions import fuse_again
from caltech_hpo.training.device import autocast, resolve_precision, try_algorithms
from caltech_hpo.training.freezing import training_mode
from caltech_hpo.training.prepare import Prepared
from caltech_hpo.training.sources import FeatureSource
from caltech_hpo.training.system_memory import is_out_of_memory, release_freed_memory
from caltech_hpo.units import size

# A batch, the one before it, and what augmentation makes on the way.
BATCHES_ALIVE = 4
# What counting misses on a CPU: what is made and freed on the way, gaps in the kept memory, and libraries'
# scratch (bytes at most, and at most as much as a model and its step; a head alone has none).
MARGIN, SCRATCH = 1.8, 1 << 28
# What frozen layers take while they run, as a multiple of what the largest of them takes and gives.
PASSING = 1.5
# What a GPU scores at once: this many images at most, and as many as this share of the memory would train.
# Scoring takes 0.26 to 0.63 of a training step's memory in five architectures, counted.
MOST_SCORED = 512
SCORING_SHARE = 0.5
# A graph keeps a step's memory for itself, beside that of plain steps and of scoring.
REPLAYING_SHARE = 1 / 3


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
    total = sum(tensor.numel() * tensor.element_size() for tensor in kept.values() if tensor is not inputs)
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


def needed_bytes(recipe: Recipe, prepared: Prepared, images: int) -> int:
    """An estimate of a CPU training's peak with its model, `images` at a time; counted, not allocated."""
    (two, _), (three, passed) = (_step_bytes(recipe, prepared, count) for count in (2, 3))
    each = max(three - two, PASSING * passed / 3)
    step = batch_bytes(recipe, prepared) + images * each
    # a piece's gradient of a layer is there before it is added to those of the pieces before it
    learning = (p.nbytes for p in prepared.model.parameters() if p.requires_grad)
    added = max(learning, default=0) if images < recipe.batch_size else 0
    model = model_bytes(prepared.model)
    scratch = 0 if isinstance(prepared.training, FeatureSource) else min(SCRATCH, model + step)
    return int(model + state_bytes(recipe, prepared) + MARGIN * step + added + scratch)


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
        _unchanged(prepared), autocast(prepared.device, precision), _passed_bytes(prepared.runs) as passed,
    ):  # fmt: skip
        return saved_bytes(prepared.runs, prepared.training.example(images)), max(passed, default=0)


@contextlib.contextmanager
def _unchanged(prepared: Prepared) -> Iterator[None]:
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


class MicroBatches:
    """Finds, once for each kind of training, how many images of a batch fit, and remembers it."""

    def __init__(self, device: torch.device, limit: int) -> None:
        """`limit` bytes may be taken. CUDA is asked by trying, a CPU by counting."""
        self._device, self._limit = device, limit
        self._known: dict[tuple[object, ...], int] = {}
        self._image_bytes: dict[tuple[object, ...], float] = {}  # of a GPU, in a training step
        self._latest: tuple[object, ...] = ()
        self.peak = 0  # bytes of a GPU taken before an attempt set its count back

    def fit(self, recipe: Recipe, prepared: Prepared) -> Prepared:
        """The training with as many images at a time as fit, all of a batch if they do.

        Raises torch.OutOfMemoryError if the fewest do not.
        """
        key = _kind(recipe, prepared)
        if key != self._latest and self._device.type != "cuda":  # another's gaps may be too small
            release_freed_memory(self._device)
        self._latest = key
        if key not in self._known:
            attempt = self._train_once if self._device.type == "cuda" else self._count
            fewest = fewest_images(prepared.runs)
            self._known[key] = halve_until(
                lambda images: attempt(recipe, prepared, images), recipe.batch_size, fewest
            )
        fitted = with_micro_batch(prepared, recipe, self._known[key])
        if fitted.micro_batch or key not in self._image_bytes:
            return fitted
        step = self._image_bytes[key] * recipe.batch_size
        fitted = replace(fitted, replays=step <= REPLAYING_SHARE * self._limit)
        if fitted.validation is None:
            return fitted
        # small batches would keep a GPU waiting where images are only scored
        room = min(MOST_SCORED, int(SCORING_SHARE * self._limit / self._image_bytes[key]))
        return replace(fitted, validation=fitted.validation.in_batches_of(max(recipe.batch_size, room)))

    def shrink(self, recipe: Recipe, prepared: Prepared) -> bool:
        """Halves what is remembered, after a training that ran out of memory; False if it cannot be less."""
        before = self._known[_kind(recipe, prepared)]
        self._known[_kind(recipe, prepared)] = max(fewest_images(prepared.runs), before // 2)
        return self._known[_kind(recipe, prepared)] < before

    def _count(self, recipe: Recipe, prepared: Prepared, images: int) -> None:
        needed = needed_bytes(recipe, prepared, images)
        if needed > self._limit:
            raise torch.OutOfMemoryError(
                f"{images} images at a time need about {size(needed)}, and {size(self._limit)} may be used"
            )

    def _train_once(self, recipe: Recipe, prepared: Prepared, images: int) -> None:
        """A step's memory, taken and given back: held arrays stand for batches and optimizer state."""
        precision = resolve_precision(recipe.precision, self._device)
        training_mode(prepared.runs, prepared.prefix)
        try_algorithms(wanted=True)
        self.peak = max(self.peak, torch.cuda.max_memory_reserved(self._device))
        try:
            with _unchanged(prepared):
                sizes = (
                    # less the gradients, which the backward pass makes
                    state_bytes(recipe, prepared) - learning_bytes(prepared.model),
                    batch_bytes(recipe, prepared),
                )
                before = torch.cuda.memory_allocated(self._device)
                held = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
                for _ in range(2):  # in the first one, cuDNN tries algorithms that it then does not take
                    torch.cuda.reset_peak_memory_stats(self._device)
                    with autocast(self._device, precision):
                        loss = prepared.runs(prepared.training.example(images)).float().square().mean()
                    loss.backward()
                    torch.cuda.synchronize(self._device)
                    taken = torch.cuda.max_memory_allocated(self._device) - before
                    del loss
                del held
        except RuntimeError:
            fuse_again(prepared.runs)
            raise
        finally:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)  # what was only tried is no training's peak
        if taken > self._limit:
            raise torch.OutOfMemoryError(
                f"{images} images at a time take {size(taken)} of {size(self._limit)}"
            )
        self._image_bytes[_kind(recipe, prepared)] = taken / images


def _kind(recipe: Recipe, prepared: Prepared) -> tuple[object, ...]:
    """What decides how much memory a training takes."""
    return (
        recipe.architecture, recipe.freeze, recipe.frozen_blocks, recipe.crop, recipe.batch_size,
        recipe.precision, recipe.optimizer, bool(recipe.ema), type(prepared.training),
        prepared.training.example(1).dtype,
    )  # fmt: skip


def halve_until(attempt: Callable[[int], None], images: int, fewest: int) -> int:
    """The largest of images, images / 2, ... down to `fewest` with which `attempt` finds room.

    Raises its torch.OutOfMemoryError if there is none.
    """
    while True:
        try:
            attempt(images)
            return images
        except RuntimeError as error:  # OutOfMemoryError is one
            if not is_out_of_memory(error) or images <= fewest:
                raise
            images = max(fewest, images // 2)


def fewest_images(model: nn.Module) -> int:
    """2 where a batch norm learns from the images' statistics, else 1."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return 2 if any(norm.weight is None or norm.weight.requires_grad for norm in norms) else 1


def with_micro_batch(prepared: Prepared, recipe: Recipe, images: int) -> Prepared:
    """The training, `images` of a batch at a time, also when it is scored."""
    if images >= recipe.batch_size:
        return prepared
    validation = prepared.validation
    return replace(
        prepared,
        micro_batch=images,
        replays=False,
        validation=None if validation is None else validation.in_batches_of(images),
    )


def in_pieces_of(prepared: Prepared, recipe: Recipe, micro_batch: int | None) -> Prepared:
    """The training in pieces of `micro_batch` images, if they fit: sums go on as they were added up before.

    None is a whole batch.
    """
    fits = prepared.micro_batch
    if micro_batch is None or (fits is not None and fits <= micro_batch):
        return prepared
    return with_micro_batch(prepared, recipe, micro_batch)
