"""Checks the tables of a study file: a problem is one line that names the key."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from caltech_hpo.ranges import SEARCHABLE, Choices, Dimension, FloatRange, IntRange
from caltech_hpo.spec import FIELD_CHECKS, Hyperparameters, StudySpec
from caltech_hpo.terms import SMALLEST_ALPHA

Model = TypeVar("Model", bound=BaseModel)


def recipe_table(table: Any) -> Any:
    """`model = "timm/NAME"` says the same as `architecture = "timm/NAME"`."""
    if isinstance(table, dict) and "model" in table and "architecture" not in table:
        return {("architecture" if name == "model" else name): value for name, value in table.items()}
    return table


ALPHAS = ("mixup", "cutmix")  # 0, or large enough to be drawn from
# Fields that some values of others exclude.
DEPENDENT = ("freeze", "frozen_blocks", "optimizer", "nesterov", "momentum")


def combination_problems(recipe: Hyperparameters, space: dict[str, Dimension]) -> list[str]:
    """Points of the space that no recipe may be, found before the search would run into them."""
    ends = {
        name: dimension.choices if isinstance(dimension, Choices) else (dimension.low, dimension.high)
        for name, dimension in space.items() if name in DEPENDENT
    }  # fmt: skip
    problems: list[str] = []
    for values in itertools.product(*ends.values()):
        point = dict(zip(ends, values, strict=True))
        try:
            Hyperparameters.model_validate({**recipe.model_dump(exclude_unset=True), **point})
        except ValidationError as error:
            shown = ", ".join(f"{name} = {value}" for name, value in point.items())
            problems.extend(describe(error, f"space ({shown})"))
    return problems[:3]


def without_effect(recipe: Hyperparameters, space: dict[str, Dimension]) -> list[str]:
    """Fields that are searched, or not left at their default, and that no trial of the space uses.

    One line each, naming the key and why; nothing in a line keeps a study from running.
    """

    def values(name: str) -> set[Any]:
        dimension = space.get(name)
        if dimension is None:
            return {getattr(recipe, name)}
        return set(dimension.choices) if isinstance(dimension, Choices) else {dimension.low, dimension.high}

    def set_to_something(name: str) -> bool:
        return name in space or getattr(recipe, name) != Hyperparameters.model_fields[name].default

    steps, resized = "step" in values("schedule"), any("resized" in name for name in values("augmentation"))
    no_step = "no trial has more epochs than step_size" if steps else 'the schedule is never "step"'
    steps = steps and min(values("step_size")) < max(values("epochs"))
    all_frozen = values("freeze") == {"features"}
    rules = [
        ("step_size", steps, no_step),
        ("gamma", steps, no_step),
        ("nesterov", "sgd" in values("optimizer"), 'the optimizer is never "sgd"'),
        ("smallest_area", resized, "the augmentation is never a random resized crop"),
        ("init", recipe.weights == "none", f'weights = "{recipe.weights}"'),
        ("head_lr_factor", values("freeze") != {"classifier"}, 'freeze = "classifier" freezes the head'),
        ("frozen_blocks", not all_frozen, 'freeze = "features" freezes all blocks'),
    ]
    found = [
        f"{'space' if name in space else 'recipe'}.{name} has no effect: {why}"
        for name, used, why in rules
        if not used and set_to_something(name)
    ]
    if recipe.weights == "none":
        frozen = {"freeze": "features" in values("freeze"), "frozen_blocks": values("frozen_blocks") != {0}}
        found += [
            f'{"space" if name in space else "recipe"}.{name} freezes random weights: weights = "none"'
            for name, freezes in frozen.items()
            if freezes
        ]
    return found


def warnings_of(spec: StudySpec) -> list[str]:
    """What of a study file has no effect, a line each; nothing in a line keeps the study from running."""
    pruner, longest = spec.pruner, spec.most_epochs
    compares = pruner.name in ("median", "percentile")
    rules = [
        ("pruner", "warmup_epochs", pruner.name != "none", pruner.name),
        ("pruner", "compare_at", pruner.name != "none", pruner.name),
        ("pruner", "startup_trials", compares, pruner.name),
        ("pruner", "percentile", pruner.name == "percentile", pruner.name),
        ("pruner", "reduction_factor", pruner.name == "hyperband", pruner.name),
        ("sampler", "startup_trials", spec.sampler.name != "random", spec.sampler.name),
    ]
    found = without_effect(spec.recipe, spec.space)
    found += [
        f'{table}.{field} has no effect: {table}.name = "{name}"'
        for table, field, used, name in rules
        if not used and field in getattr(spec, table).model_fields_set
    ]
    if pruner.name != "none" and pruner.warmup_epochs >= longest:
        found.append(
            f"pruner.warmup_epochs = {pruner.warmup_epochs} leaves nothing to prune: no trial has more than "
            f"{longest} epochs"
        )
    return found


def model_of(kind: type[Model], table: Any, key: str, problems: list[str]) -> Model | None:
    """Validates one table; on failure adds "key.field: what" lines and returns None."""
    if not isinstance(table, dict):
        problems.append(f"{key}: missing" if table is None else f"{key}: must be a table")
        return None
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        problems.extend(describe(error, key))
        return None


# Pydantic's words for what a file can have, in a user's.
PLAIN = {
    "extra_forbidden": "there is no such field; the README lists them",
    "too_short": "is empty",
    "missing": "must be given",
}


def describe(error: ValidationError, key: str) -> list[str]:
    """Pydantic's findings as "key.field: what (got value)" lines."""
    lines = []
    for item in error.errors():
        where = ".".join([key, *(str(part) for part in item["loc"])])
        got = item.get("input")
        shown = f" (got {got!r})" if isinstance(got, (str, int, float, bool)) else ""
        what = PLAIN.get(item["type"]) or item["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {what}{shown}")
    return lines


def space_of(table: Any, problems: list[str]) -> dict[str, Dimension]:
    """The dimensions of a [space] table that are right; what is wrong goes into `problems`."""
    if not isinstance(table, dict):
        problems.append("space: must be a table")
        return {}
    space: dict[str, Dimension] = {}
    for name, entry in table.items():
        key = f"space.{name}"
        if name not in SEARCHABLE:
            problems.append(f"{key}: cannot be searched (searchable: {', '.join(SEARCHABLE)})")
            continue
        if not isinstance(entry, dict):
            problems.append(f"{key}: write {{ low = ..., high = ... }} or {{ choices = [...] }}")
            continue
        kind: type[Choices] | type[IntRange] | type[FloatRange] | None
        kind = Choices if "choices" in entry else SEARCHABLE[name]
        if kind is None:
            problems.append(f"{key}: needs {{ choices = [...] }}")
            continue
        dimension: Dimension | None = model_of(kind, entry, key, problems)
        if dimension is not None:
            space[name] = dimension
            problems.extend(_bound_problems(name, dimension))
    return space


def _bound_problems(name: str, dimension: Dimension) -> list[str]:
    """The ends of a range, or its choices, that the recipe's field would refuse."""
    if name in ALPHAS and isinstance(dimension, FloatRange) and dimension.low == 0:
        return [
            f"space.{name}.low: draws between 0 and {SMALLEST_ALPHA} would be refused; write low = "
            f"{SMALLEST_ALPHA} or more, or choices, which may have 0 (off)"
        ]
    if isinstance(dimension, Choices):
        ends = {f"choices[{i}]": value for i, value in enumerate(dimension.choices)}
    else:
        ends = {"low": dimension.low, "high": dimension.high}
    return [
        line for end, value in ends.items() for line in _field_problems(name, value, f"space.{name}.{end}")
    ]


def _field_problems(name: str, value: Any, key: str) -> list[str]:
    try:
        FIELD_CHECKS[name].validate_python(value, strict=isinstance(value, bool))
    except ValidationError as error:
        return describe(error, key)
    return []
