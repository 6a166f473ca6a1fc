"""What a training costs on one machine, as measured there: the value that workers hand to the forecast."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from caltech_hpo.ranges import Frozen
from caltech_hpo.spec import Hyperparameters
from caltech_hpo.terms import Freeze


class Kind(Frozen):
    """What decides the cost of a training of one architecture.

    `views` is how many views of an image it draws from where they are few enough to keep a frozen
    prefix's outputs (1 or 2), else 0; `copies` is how often an epoch shows each image.
    """

    freeze: Freeze
    frozen_blocks: NonNegativeInt
    batch_size: Annotated[int, Field(ge=1)]
    views: NonNegativeInt
    copies: Annotated[int, Field(ge=1)] = 1

    def distance(self, other: Kind) -> float:
        """How different two kinds' costs may be; 0 for the same one."""
        return (
            100 * (self.freeze != other.freeze) + 100 * ((self.views > 0) != (other.views > 0))
            + abs(self.frozen_blocks - other.frozen_blocks)
            + 0.1 * abs(math.log2(self.batch_size / other.batch_size))
            + 0.01 * (abs(self.views - other.views) + abs(self.copies - other.copies))
        )  # fmt: skip

    def is_like(self, other: Kind) -> bool:
        """Whether an epoch of one says what an epoch of the other takes.

        Nothing but the batch size may differ, at most four times.
        """
        same = self.model_copy(update={"batch_size": other.batch_size}) == other
        return same and 1 / 4 <= self.batch_size / other.batch_size <= 4


class StepTime(Frozen):
    """Seconds of one kind of training: once a trial (`setup`), a training batch, a validation image.

    The batches that count took `spread` times as long as the shortest of them: more than a little where other
    programs run. `once` seconds an image and view go by where a frozen prefix is computed for the first time
    (0: nothing is kept), taking `kept` bytes each on disk. `memory` is the estimated peak in bytes, the model
    included; `weights` is the model's part of it, and the size of its file; `checkpoint` is a checkpoint's
    size. A batch goes in pieces of `micro_batch` images (None: whole).
    """

    kind: Kind
    setup: NonNegativeFloat
    batch: NonNegativeFloat
    evaluation: NonNegativeFloat
    spread: Annotated[float, Field(ge=1)] = 1.0
    once: NonNegativeFloat = 0.0
    kept: NonNegativeInt = 0
    memory: NonNegativeInt = 0
    weights: NonNegativeInt = 0
    checkpoint: NonNegativeInt = 0
    micro_batch: Annotated[int, Field(ge=1)] | None = None

    def times(self, factor: float) -> StepTime:
        """The same, every step taking `factor` times as long."""
        return self.model_copy(update={"batch": self.batch * factor, "evaluation": self.evaluation * factor})

    def epoch(self, training: int, validation: int) -> float:
        """Seconds of an epoch over so many images."""
        batches = max(1, round(self.kind.copies * training / self.kind.batch_size))
        return batches * self.batch + validation * self.evaluation


FEW_VIEWS: dict[str, int] = {"center_crop": 1, "center_crop_flip": 2}
CONCAT_COPIES = 4  # how often an epoch of "concat" shows each image


def views_of(recipe: Hyperparameters) -> int:
    """How many views of an image training draws from: 1, 2 (mirrored too), or 0 for no finite number."""
    drawn = recipe.mixup or recipe.cutmix or recipe.erasing or recipe.color_jitter
    return 0 if drawn else FEW_VIEWS.get(recipe.augmentation, 0)


def kind_of(recipe: Hyperparameters) -> Kind:
    """The kind of a recipe."""
    frozen = recipe.frozen_blocks > 0 or recipe.freeze == "features"
    return Kind(
        freeze=recipe.freeze, frozen_blocks=recipe.frozen_blocks, batch_size=recipe.batch_size,
        views=views_of(recipe) if frozen else 0,
        copies=CONCAT_COPIES if recipe.augmentation == "concat" else 1,
    )  # fmt: skip
