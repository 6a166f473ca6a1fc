"""What a search space is made of: ranges and choices, and which fields may have them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator


class Frozen(BaseModel):
    """Immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


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

    choices: Annotated[tuple[str | bool | int | float, ...], Field(min_length=1)]

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
    "optimizer": None,
    "nesterov": None,
    "schedule": None,
    "warmup": FloatRange,
    "label_smoothing": FloatRange,
    "mixup": FloatRange,
    "cutmix": FloatRange,
    "erasing": FloatRange,
    "color_jitter": FloatRange,
    "smallest_area": FloatRange,
    "head_lr_factor": FloatRange,
    "frozen_blocks": IntRange,
    "dropout": FloatRange,
    "ema": FloatRange,
    "init": None,
}
