"""Optuna's tables, as they are written."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from optuna.storages._rdb import models  # Optuna's schema; it has no public name
from optuna.trial import FrozenTrial
from sqlalchemy import Table

TRIALS: Table = models.TrialModel.__table__
# What a row of each table is known by, beside its trial or study.
KEYS: dict[Table, str] = {
    models.TrialParamModel.__table__: "param_name",
    models.TrialValueModel.__table__: "objective",
    models.TrialIntermediateValueModel.__table__: "step",
    models.TrialUserAttributeModel.__table__: "key",
    models.TrialSystemAttributeModel.__table__: "key",
    models.StudyUserAttributeModel.__table__: "key",
    models.StudySystemAttributeModel.__table__: "key",
}
PARAMS, VALUES, STEPS, USER_ATTRS, SYSTEM_ATTRS, STUDY_USER_ATTRS, STUDY_SYSTEM_ATTRS = KEYS


def trial_row(trial: FrozenTrial) -> dict[str, Any]:
    """State and times; Optuna keeps times in UTC, without saying so in the value."""
    return {
        "state": trial.state,
        "datetime_start": _utc(trial.datetime_start),
        "datetime_complete": _utc(trial.datetime_complete),
    }


def _utc(local: datetime | None) -> datetime | None:
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)
