"""The values that cross the seams: `Recipe` in, `EpochResult` back; `StudySpec` describes a study."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator

from caltech_hpo.ranges import Choices, Dimension, IntRange
from caltech_hpo.ranges import Frozen as Frozen
from caltech_hpo.terms import (
    BLOCKS,
    DEFAULT_SMALLEST_CROP,
    SMALLEST_CROP,
    TIMM,
    Alpha,
    Architecture,
    AugmentationName,
    FitOn,
    Freeze,
    InitName,
    OptimizerName,
    Precision,
    ScheduleName,
)


class Hyperparameters(Frozen):
    """What one training does, before it is bound to a seed and a data set.

    The defaults are the stock values of the course that the report was written for; what the report
    does not use is off. Sizes are in pixels.

    `learning_rate` is the highest of the schedule: "step" lets it fall by `gamma` every `step_size`
    epochs, "cosine" to 0, "one_cycle" rises to it first. `warmup` is the share of the training in
    which it rises (0: not at all; 0.3 for one_cycle). The head's is `head_lr_factor` times as high.
    AdamW takes `momentum` as its first beta. `mixup` and `cutmix` are the alpha of their Beta
    distributions (both above 0: half of the images each), `erasing` a probability, `color_jitter`
    the largest relative change of brightness, contrast and saturation, `smallest_area` the least
    share of an image that a random resized crop shows, `ema` the decay of the averaged weights a
    step. `dropout` None is the architecture's own. `init` "kaiming" draws convolutions and linear
    layers but the head by that rule where there is no weights file. `test_time_flip` scores a second
    time, over each image and its mirror image.
    """

    architecture: Architecture
    weights: Annotated[str, Field(min_length=1)] = "none"  # none | imagenet | path of a weights file
    freeze: Freeze = "none"
    augmentation: AugmentationName = "center_crop"
    batch_size: Annotated[int, Field(ge=2, le=65536)] = 256
    learning_rate: Annotated[FiniteFloat, Field(gt=0)] = 0.001
    momentum: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 5e-5
    step_size: Annotated[int, Field(ge=1)] = 20
    gamma: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.1
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 30
    resize: Annotated[int, Field(ge=32, le=2048)] = 256
    crop: Annotated[int, Field(ge=32, le=2048)] = 224
    precision: Precision = "auto"
    optimizer: OptimizerName = "sgd"
    nesterov: bool = False
    schedule: ScheduleName = "step"
    warmup: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    label_smoothing: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    mixup: Alpha = 0.0
    cutmix: Alpha = 0.0
    erasing: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    color_jitter: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    smallest_area: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.08
    head_lr_factor: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    frozen_blocks: Annotated[int, Field(ge=0)] = 0
    dropout: Annotated[FiniteFloat, Field(ge=0, lt=1)] | None = None
    ema: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    test_time_flip: bool = False
    init: InitName = "default"

    @model_validator(mode="after")
    def _sizes_fit(self) -> Hyperparameters:
        # what a study leaves out of a timm model's sizes is filled in later, with timm's own
        given = {"crop", "resize"} & self.model_fields_set
        if self.crop > self.resize and (len(given) == 2 or not self.architecture.startswith(TIMM)):
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        smallest = SMALLEST_CROP.get(self.architecture, DEFAULT_SMALLEST_CROP)
        if self.crop < smallest:
            raise ValueError(f"crop {self.crop} is too small: {self.architecture} needs at least {smallest}")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Hyperparameters:
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        blocks = BLOCKS.get(self.architecture)
        if blocks is not None and self.frozen_blocks > blocks:
            raise ValueError(f"frozen_blocks {self.frozen_blocks}: {self.architecture} has {blocks}")
        if self.freeze == "classifier" and self.frozen_blocks == blocks:
            raise ValueError(f"freeze classifier and frozen_blocks {blocks} leave nothing to train")
        return self


class Recipe(Hyperparameters):
    """Everything one training needs and nothing else; the same hash means the same training.

    `data` is the fingerprint of the images, classes and split. `weights_sha256` pins the content
    of a weights file; it is empty for "none" and "imagenet".
    """

    classes: Annotated[int, Field(ge=2)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: str
    fit_on: FitOn = "train"
    weights_sha256: str = ""

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of the SHA-256 over the canonical JSON."""
        return self._hashed()

    @property
    def configuration(self) -> str:
        """As `hash`, with the seed set aside: what the trainings of one recipe over many seeds share."""
        return self._hashed("seed")

    def _hashed(self, *without: str) -> str:
        return digest(without_later_defaults(self.model_dump(mode="json", exclude=set(without))))


class EpochResult(Frozen):
    """One epoch, the only thing that a worker hands back while it trains.

    Losses are means over images; they may be infinite or NaN, which is for the search to judge.
    Validation fields are None when the recipe trains on the validation images too;
    `validation_top1_flip` is the accuracy over each image and its mirror image, where asked for.
    `micro_batch` is how many images were computed at a time where a batch did not fit the memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")

    epoch: Annotated[int, Field(ge=1)]
    learning_rate: float
    training_loss: float
    validation_loss: float | None
    validation_top1: float | None
    validation_top1_flip: float | None = None
    images: int
    seconds: float
    micro_batch: int | None = None


FIELD_CHECKS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(Annotated[info.annotation, info])  # type: ignore[arg-type]
    for name, info in Hyperparameters.model_fields.items()
}


class SamplerSpec(Frozen):
    """Which Optuna sampler proposes trials; `startup_trials` random ones come first."""

    name: Literal["tpe", "random", "gp", "cmaes"] = "tpe"
    startup_trials: Annotated[int, Field(ge=0)] = 10


class PrunerSpec(Frozen):
    """Which Optuna pruner ends trials that lag; no trial is pruned before `warmup_epochs`.

    `startup_trials` completed trials come before median and percentile prune. `percentile` keeps
    that share of trials; `reduction_factor` is Hyperband's. `compare_at` says where trials of different
    lengths meet: at the same epoch, or at the same fraction of each one's own schedule.
    """

    name: Literal["median", "percentile", "hyperband", "none"] = "median"
    warmup_epochs: Annotated[int, Field(ge=1)] = 10
    startup_trials: Annotated[int, Field(ge=1)] = 4
    percentile: Annotated[FiniteFloat, Field(gt=0, lt=100)] = 50.0
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    compare_at: Literal["epoch", "fraction"] = "epoch"


class Published(Frozen):
    """What the report printed for a hand-tuned row; None where it printed nothing.

    `outcome` holds words in place of figures, such as "diverges".
    """

    final_loss: FiniteFloat | None = None
    validation: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    test: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    outcome: str = ""

    @property
    def has_figures(self) -> bool:
        """Whether there is a number to compare with."""
        return any(value is not None for value in (self.final_loss, self.validation, self.test))


class Baseline(Frozen):
    """A hand-tuned row: the values it sets (the rest come from `[recipe]`) and what was published."""

    name: Annotated[str, Field(min_length=1)]
    params: dict[str, str | bool | int | float]
    published: Published = Published()


class StudySpec(Frozen):
    """A study file, resolved: fixed values, search space, sampler, pruner, baselines.

    `folder` is where the images of data = "folder" are; what they are is the fingerprint's to say.
    """

    name: str
    about: str = ""
    data: Literal["caltech101", "demo", "folder"] = "caltech101"
    folder: str = ""
    recipe: Hyperparameters
    space: dict[str, Dimension]
    sampler: SamplerSpec = SamplerSpec()
    pruner: PrunerSpec = PrunerSpec()
    baselines: tuple[Baseline, ...] = ()

    @property
    def hash(self) -> str:
        """16 hexadecimal digits over everything that decides a trial (not names, comment, or folder)."""
        document = self.model_dump(mode="json", exclude={"name", "about", "folder"})
        document["recipe"] = without_later_defaults(document["recipe"])
        if self.pruner.compare_at == "epoch":  # studies made before the field keep their hash
            del document["pruner"]["compare_at"]
        return digest(document)

    @property
    def most_epochs(self) -> int:
        """The longest training that the space allows."""
        dimension = self.space.get("epochs")
        if isinstance(dimension, IntRange):
            return dimension.high
        if isinstance(dimension, Choices):
            return max(int(choice) for choice in dimension.choices)
        return self.recipe.epochs


# The fields of the first version; later ones count in a hash only where they are used, so that what
# was recorded before them keeps its hash.
FIRST_FIELDS = {
    "architecture", "weights", "freeze", "augmentation", "batch_size", "learning_rate", "momentum",
    "weight_decay", "step_size", "gamma", "epochs", "resize", "crop", "precision",
}  # fmt: skip


def without_later_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A dumped recipe without the later fields that have their defaults."""
    later = {
        name: info.default for name, info in Hyperparameters.model_fields.items() if name not in FIRST_FIELDS
    }
    return {name: value for name, value in recipe.items() if name not in later or value != later[name]}


def digest(document: Any) -> str:
    """16 hexadecimal digits of the SHA-256 over a document's canonical JSON."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
