"""What happens while `confirm` trains."""

from __future__ import annotations

from dataclasses import dataclass

from caltech_hpo.results.runs_table import ConfirmRun
from caltech_hpo.search.messages import EpochPart
from caltech_hpo.spec import EpochResult, Recipe


@dataclass(frozen=True)
class Training:
    """One training of a finalist."""

    trial: int
    recipe: Recipe


@dataclass(frozen=True)
class TrainingStarted:
    """A worker has begun a training; `resumed`: from a checkpoint, the epochs before it come again.

    `lost`: it had begun before, but its worker was killed.
    """

    training: Training
    resumed: bool = False
    lost: bool = False


@dataclass(frozen=True)
class TrainingUnderway:
    """Where a training is."""

    training: Training
    part: EpochPart


@dataclass(frozen=True)
class TrainingEpoch:
    """An epoch of a training; one from `before` the checkpoint is told again."""

    training: Training
    result: EpochResult
    before: bool = False


@dataclass(frozen=True)
class TrainingEnded:
    """A training is in the database."""

    training: Training
    run: ConfirmRun


ConfirmEvent = TrainingStarted | TrainingUnderway | TrainingEpoch | TrainingEnded
