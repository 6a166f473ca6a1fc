"""Where a training's batches come from: decoded images, or stored outputs of a frozen prefix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from caltech_hpo.data.augment import AUGMENTATIONS
from caltech_hpo.data.batches import BatchPlan, Images, batch_sizes, evaluation_batches, training_batches
from caltech_hpo.data.resident import to_device
from caltech_hpo.spec import Recipe
from caltech_hpo.terms import TIMM
from caltech_hpo.training.architectures import normalization_for
from caltech_hpo.training.device import resolve_precision

Batches = Iterator[tuple[Tensor, Tensor]]


class Source(Protocol):
    """A split, as batches of (inputs, labels) on its device."""

    def __len__(self) -> int:
        """How many images it has."""

    @property
    def sizes(self) -> list[int]:
        """The sizes of an epoch's training batches."""

    def in_batches_of(self, images: int) -> Source:
        """The same images in batches of another size."""

    def example(self, count: int) -> Tensor:
        """Inputs like a batch's, of `count` images, all zeros."""

    def training(self, order: torch.Generator, draws: torch.Generator, *, start: int = 0) -> Batches:
        """One epoch in random order, augmented, from batch `start` on."""

    def evaluation(self, *, flipped: bool = False) -> Batches:
        """All images in order, centre crops, mirrored if `flipped`."""


def plan_for(recipe: Recipe, device: torch.device) -> BatchPlan:
    """How the recipe's images become batches; pretrained weights bring their own normalisation.

    In bf16 a GPU gets them rounded as the first convolution would, where nothing is to be computed before.
    """
    rounds = device.type == "cuda" and resolve_precision(recipe.precision, device) == "bf16"
    computes = recipe.mixup or recipe.cutmix or recipe.erasing or recipe.architecture.startswith(TIMM)
    return BatchPlan(
        recipe.batch_size, recipe.crop, normalization_for(recipe.architecture, recipe.weights), device,
        augmentation=AUGMENTATIONS[recipe.augmentation], smallest_area=recipe.smallest_area,
        color_jitter=recipe.color_jitter, erasing=recipe.erasing, mixup=recipe.mixup,
        cutmix=recipe.cutmix, classes=recipe.classes,
        dtype=torch.bfloat16 if rounds and not computes else torch.float32,
    )  # fmt: skip


@dataclass(frozen=True)
class ImageSource:
    """Batches of normalised images (n, 3, crop, crop)."""

    images: Images
    plan: BatchPlan

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sizes(self) -> list[int]:
        """As `batch_sizes` says."""
        return batch_sizes(len(self.images), self.plan)

    def in_batches_of(self, images: int) -> ImageSource:
        """With another batch size."""
        return replace(self, plan=replace(self.plan, batch_size=images))

    def example(self, count: int) -> Tensor:
        """(count, 3, crop, crop) of the plan's type, channels_last."""
        shape = (count, 3, self.plan.crop, self.plan.crop)
        zeros = torch.zeros(shape, dtype=self.plan.dtype, device=self.plan.device)
        return zeros.contiguous(memory_format=torch.channels_last)

    def training(self, order: torch.Generator, draws: torch.Generator, *, start: int = 0) -> Batches:
        """One epoch, augmented."""
        return training_batches(self.images, self.plan, order, draws, start=start)

    def evaluation(self, *, flipped: bool = False) -> Batches:
        """Centre crops."""
        for pixels, labels in evaluation_batches(self.images, self.plan):
            yield (pixels.flip(3) if flipped else pixels), labels


@dataclass(frozen=True)
class FeatureSource:
    """Batches of stored features: `views` are (n, ...) of the plain and, if needed, the mirrored images.

    The draws are those that an `ImageSource` of the same plan makes, so that a recipe trains on the
    same images in the same order, mirrored or not.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    plan: BatchPlan

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> list[int]:
        """As `batch_sizes` says."""
        return batch_sizes(len(self.labels), self.plan)

    def in_batches_of(self, images: int) -> FeatureSource:
        """With another batch size."""
        return replace(self, plan=replace(self.plan, batch_size=images))

    def example(self, count: int) -> Tensor:
        """(count, ...) of the features' type."""
        return torch.zeros_like(self.views[0][:1]).expand(count, *self.views[0].shape[1:]).contiguous()

    def training(self, order: torch.Generator, draws: torch.Generator, *, start: int = 0) -> Batches:
        """One epoch; images are mirrored as the augmentation says."""
        permutation = torch.randperm(len(self.labels), generator=order)
        flip = self.plan.augmentation.flip
        for chosen in torch.split(permutation[: sum(self.sizes)], self.plan.batch_size)[start:]:
            batch = self._rows(self.views[0], chosen)
            if flip:
                mirrored = torch.rand(len(chosen), generator=draws) < flip
                places = to_device(mirrored.nonzero()[:, 0], batch.device)
                batch[places] = self._rows(self.views[1], chosen[mirrored])
            yield batch, self._rows(self.labels, chosen)

    def evaluation(self, *, flipped: bool = False) -> Batches:
        """All in order."""
        for chosen in torch.split(torch.arange(len(self.labels)), self.plan.batch_size):
            yield self._rows(self.views[int(flipped)], chosen), self._rows(self.labels, chosen)

    def _rows(self, tensor: Tensor, chosen: Tensor) -> Tensor:
        return tensor[to_device(chosen, tensor.device)].to(self.plan.device)
