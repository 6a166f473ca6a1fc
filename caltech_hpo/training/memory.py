"""How many images are computed at a time: as many of a batch as the memory holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from caltech_hpo.spec import Recipe
from caltech_hpo.training.convolutions import fuse_again
from caltech_hpo.training.device import autocast, resolve_precision, try_algorithms
from caltech_hpo.training.freezing import training_mode
from caltech_hpo.training.memory_estimate import (
    batch_bytes,
    learning_bytes,
    needed_bytes,
    state_bytes,
    unchanged,
)
from caltech_hpo.training.prepare import Prepared
from caltech_hpo.training.system_memory import is_out_of_memory, release_freed_memory
from caltech_hpo.units import size

# What a GPU scores at once: this many images at most, and as many as this share of the memory would train.
# Scoring takes 0.26 to 0.63 of a training step's memory in five architectures, counted.
MOST_SCORED = 512
SCORING_SHARE = 0.5
# A graph keeps a step's memory for itself, beside that of plain steps and of scoring.
REPLAYING_SHARE = 1 / 3


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
            attempt = partial(self._train_once, recipe, prepared)
            if self._device.type != "cuda":
                attempt = partial(self._require, needed_bytes(recipe, prepared))
            self._known[key] = halve_until(attempt, recipe.batch_size, fewest_images(prepared.runs))
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

    def _require(self, needed: Callable[[int], int], images: int) -> None:
        if (asked := needed(images)) > self._limit:
            some = "1 image at a time needs" if images == 1 else f"{images} images at a time need"
            raise torch.OutOfMemoryError(f"{some} about {size(asked)}, and {size(self._limit)} may be used")

    def _train_once(self, recipe: Recipe, prepared: Prepared, images: int) -> None:
        """A step's memory, taken and given back: held arrays stand for batches and optimizer state."""
        precision = resolve_precision(recipe.precision, self._device)
        training_mode(prepared.runs, prepared.prefix)
        try_algorithms(wanted=True)
        self.peak = max(self.peak, torch.cuda.max_memory_reserved(self._device))
        try:
            with unchanged(prepared):
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
