"""A study's space and a trial to a recipe: the only suggest_* calls."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caltech_hpo.ranges import Choices, Dimension, IntRange
from caltech_hpo.spec import Hyperparameters, Recipe, StudySpec
from caltech_hpo.terms import Precision

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Binding:
    """What a recipe needs besides the study's values: where it will run and on which data."""

    classes: int
    data: str
    seed: int
    precision: Precision
    weights_sha256: str = ""


def suggest(trial: optuna.Trial, spec: StudySpec) -> dict[str, Any]:
    """Draws a value for each dimension of the space, in the file's order.

    A queued trial keeps its queued values, also numbers outside the space.
    """
    params: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fixed parameter .* is out of range")
        for name, dimension in spec.space.items():
            params[name] = _suggest_one(trial, name, dimension)
    return params


def _suggest_one(trial: optuna.Trial, name: str, dimension: Dimension) -> Any:
    if isinstance(dimension, Choices):
        return trial.suggest_categorical(name, dimension.choices)
    if isinstance(dimension, IntRange):
        return trial.suggest_int(name, dimension.low, dimension.high, step=dimension.step)
    return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)


def most_demanding(spec: StudySpec) -> Hyperparameters:
    """The study's fixed values with what asks most of a model: a worker builds it before the first trial.

    Only the model knows how many blocks it has, and whether there is a place for dropout.
    """
    asked: dict[str, Any] = {}
    blocks, dropout = spec.space.get("frozen_blocks"), spec.space.get("dropout")
    if isinstance(blocks, IntRange):
        asked["frozen_blocks"] = blocks.high
    elif isinstance(blocks, Choices):
        asked["frozen_blocks"] = max(int(choice) for choice in blocks.choices)
    if dropout is not None:
        asked["dropout"] = 0.0
    return spec.recipe.model_copy(update=asked)


def recipe_for(spec: StudySpec, params: dict[str, Any], binding: Binding) -> Recipe:
    """The recipe of one trial. Raises pydantic's ValidationError for values that no recipe may have."""
    fixed = spec.recipe.model_dump()
    precision = binding.precision if spec.recipe.precision == "auto" else spec.recipe.precision
    return Recipe.model_validate(
        {
            **fixed,
            **params,
            "precision": precision,
            "classes": binding.classes,
            "data": binding.data,
            "seed": binding.seed,
            "weights_sha256": binding.weights_sha256,
        }
    )
