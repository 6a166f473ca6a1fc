"""The values that cross the seams: `Recipe` in, `EpochResult` back; `StudySpec` describes a study."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator

Architecture = Literal["alexnet", "resnet18", "resnet34", "resnet50", "vgg16", "vgg16_bn"]
Freeze = Literal["none", "features", "classifier"]
AugmentationName = Literal[
    "center_crop", "random_crop", "center_crop_flip", "random_crop_flip", "center_crop_rotation"
]
Precision = Literal["auto", "bf16", "fp32"]
FitOn = Literal["train", "train+val"]

# The smallest input whose feature map is not empty; AlexNet's three poolings need 63 pixels.
SMALLEST_CROP: dict[str, int] = {"alexnet": 63}
DEFAULT_SMALLEST_CROP = 32


class Frozen(BaseModel):
    """Immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Hyperparameters(Frozen):
    """What one training does, before it is bound to a seed and a data set.

    The defaults are the stock values of the course that the report was written for.
    Sizes are in pixels; `learning_rate` falls by `gamma` every `step_size` epochs.
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

    @model_validator(mode="after")
    def _sizes_fit(self) -> Hyperparameters:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        smallest = SMALLEST_CROP.get(self.architecture, DEFAULT_SMALLEST_CROP)
        if self.crop < smallest:
            raise ValueError(f"crop {self.crop} is too small: {self.architecture} needs at least {smallest}")
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
        return digest(self.model_dump(mode="json", exclude=set(without)))


class EpochResult(Frozen):
    """One epoch, the only thing that a worker hands back while it trains.

    Losses are means over images; they may be infinite or NaN, which is for the search to judge.
    Validation fields are None when the recipe trains on the validation images too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")

    epoch: Annotated[int, Field(ge=1)]
    learning_rate: float
    training_loss: float
    validation_loss: float | None
    validation_top1: float | None
    images: int
    seconds: float


class FloatRange(Frozen):
    """Real numbers from `low` to `high`, both included; `log` samples the exponent evenly."""

    low: FiniteFloat
    high: FiniteFloat
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> FloatRange:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log = true needs low above 0, not {self.low:g}")
        return self

    def contains(self, value: Any) -> bool:
        """Whether a number lies in the range."""
        return isinstance(value, (int, float)) and self.low <= value <= self.high


class IntRange(Frozen):
    """Integers `low`, `low + step`, ... up to `high`."""

    low: int
    high: int
    step: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _ordered(self) -> IntRange:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if (self.high - self.low) % self.step:
            raise ValueError(f"high {self.high} is not low {self.low} plus a multiple of step {self.step}")
        return self

    def contains(self, value: Any) -> bool:
        """Whether an integer lies on the grid."""
        return (
            isinstance(value, int) and self.low <= value <= self.high and (value - self.low) % self.step == 0
        )


class Choices(Frozen):
    """One of the listed values."""

    choices: Annotated[tuple[str | int | float, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Choices:
        if len(set(self.choices)) != len(self.choices):
            raise ValueError("a choice is listed twice")
        return self

    def contains(self, value: Any) -> bool:
        """Whether the value is listed."""
        return value in self.choices


Dimension = FloatRange | IntRange | Choices

# Searchable fields and the kind of range that each may have besides a list of choices.
SEARCHABLE: dict[str, type[FloatRange] | type[IntRange] | None] = {
    "learning_rate": FloatRange,
    "step_size": IntRange,
    "epochs": IntRange,
    "batch_size": IntRange,
    "momentum": FloatRange,
    "weight_decay": FloatRange,
    "gamma": FloatRange,
    "freeze": None,
    "augmentation": None,
}

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
    that share of trials; `reduction_factor` is Hyperband's.
    """

    name: Literal["median", "percentile", "hyperband", "none"] = "median"
    warmup_epochs: Annotated[int, Field(ge=1)] = 10
    startup_trials: Annotated[int, Field(ge=1)] = 4
    percentile: Annotated[FiniteFloat, Field(gt=0, lt=100)] = 50.0
    reduction_factor: Annotated[int, Field(ge=2)] = 3


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
    params: dict[str, str | int | float]
    published: Published = Published()


class StudySpec(Frozen):
    """A study file, resolved: fixed values, search space, sampler, pruner, baselines."""

    name: str
    about: str = ""
    data: Literal["caltech101", "demo", "folder"] = "caltech101"
    recipe: Hyperparameters
    space: dict[str, Dimension]
    sampler: SamplerSpec = SamplerSpec()
    pruner: PrunerSpec = PrunerSpec()
    baselines: tuple[Baseline, ...] = ()

    @property
    def hash(self) -> str:
        """16 hexadecimal digits over everything that decides a trial (not the name or the comment)."""
        return digest(self.model_dump(mode="json", exclude={"name", "about"}))

    @property
    def most_epochs(self) -> int:
        """The longest training that the space allows."""
        dimension = self.space.get("epochs")
        if isinstance(dimension, IntRange):
            return dimension.high
        if isinstance(dimension, Choices):
            return max(int(choice) for choice in dimension.choices)
        return self.recipe.epochs


def digest(document: Any) -> str:
    """16 hexadecimal digits of the SHA-256 over a document's canonical JSON."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
