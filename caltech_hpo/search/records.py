"""What the database holds of a trial, as a typed record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from caltech_hpo.spec import EpochResult, Frozen, Recipe

if TYPE_CHECKING:
    import optuna

BASELINE_ATTR = "baseline"
RECIPE_KEY = "caltech_hpo:recipe"
EPOCH_KEY = "caltech_hpo:epoch:"

State = Literal["running", "complete", "pruned", "failed", "waiting"]


class TrialRecord(Frozen):
    """One trial. `value` is the best validation top-1 accuracy over its epochs, 0 to 1; `value_flip`
    that epoch's with test-time flip, where the recipe asks for it.

    `baseline` names the hand-tuned row that it repeats, or is empty; `epochs` are its curves.
    `final_loss` may be infinite or NaN.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    number: int
    state: State
    params: dict[str, Any]
    value: float | None
    value_flip: float | None = None
    best_epoch: int | None
    final_loss: float | None
    seconds: float
    baseline: str
    stop_reason: str
    device: str
    precision: str
    recipe: Recipe | None
    epochs: tuple[EpochResult, ...]


def trial_record(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    """Reads one trial of Optuna's."""
    attrs, system = trial.user_attrs, trial.system_attrs
    epochs = sorted(
        (EpochResult.model_validate(value) for key, value in system.items() if key.startswith(EPOCH_KEY)),
        key=lambda result: result.epoch,
    )
    scored = [result for result in epochs if result.validation_top1 is not None]
    best = max(scored, key=lambda result: (result.validation_top1 or 0.0, -result.epoch), default=None)
    state: Any = {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
    return TrialRecord(
        number=trial.number,
        state=state,
        params=trial.params or system.get("fixed_params", {}),
        value=best.validation_top1 if best else None,
        value_flip=best.validation_top1_flip if best else None,
        best_epoch=best.epoch if best else None,
        final_loss=epochs[-1].training_loss if epochs else None,
        seconds=sum(result.seconds for result in epochs),
        baseline=attrs.get(BASELINE_ATTR, ""),
        stop_reason=attrs.get("stop_reason", ""),
        device=attrs.get("device", ""),
        precision=attrs.get("precision", ""),
        recipe=Recipe.model_validate(system[RECIPE_KEY]) if RECIPE_KEY in system else None,
        epochs=tuple(epochs),
    )


def trial_records(study: optuna.Study) -> list[TrialRecord]:
    """All trials of a study, by number."""
    return [trial_record(trial) for trial in study.get_trials(deepcopy=False)]


def best_record(records: list[TrialRecord]) -> TrialRecord | None:
    """The complete trial with the highest value, the earliest of equals; None without one."""
    complete = [record for record in records if record.state == "complete" and record.value is not None]
    return max(complete, key=lambda record: (record.value or 0.0, -record.number), default=None)


def lacked_memory(stop_reason: str) -> bool:
    """Whether a trial with this reason found no memory: who searches again has given it more."""
    return stop_reason.startswith("out of memory")


def finished_count(records: Sequence[TrialRecord]) -> int:
    """Complete and pruned trials: what --trials counts."""
    return sum(record.state in ("complete", "pruned") for record in records)
