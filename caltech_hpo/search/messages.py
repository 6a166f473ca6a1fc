"""What crosses between supervisor and worker: a job one way, events the other. All picklable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from caltech_hpo.data.loading import SearchData
from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.spec import EpochResult, Hyperparameters, Recipe
from caltech_hpo.terms import Precision
from caltech_hpo.timings import StepTime

STARTING = "workers that are ready"  # what is counted while they start: they import torch for seconds


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker opens once. `threads` limits torch's CPU threads (None: torch decides); `features`
    is where outputs of frozen prefixes are kept (None: nowhere, they are computed with every batch).
    `workers` share the machine; `memory` bytes may be used by all of them (None: most of what is free).

    The model of the study's `recipe` is built before the first trial, so that missing or unsuitable
    weights are refused at once.
    """

    data: SearchData
    device: str
    threads: int | None
    recipe: Hyperparameters
    features: Path | None = None
    workers: int = 1
    memory: int | None = None


@dataclass(frozen=True)
class Job:
    """One training. `keep` is where the best epoch's weights go when it ends by itself, if its validation
    accuracy is over `above`; `checkpoint` where it is to go on from and where it is kept while it runs (None:
    nowhere), and after its last epoch if `checkpoint_at_end`. The first `known` epochs need not be told
    again."""

    number: int
    recipe: Recipe
    keep: Path | None = None
    checkpoint: Path | None = None
    known: int = 0
    above: float = -1.0
    checkpoint_at_end: bool = False

    def goes_on_from(self, document: dict[str, Any]) -> bool:
        """Whether a checkpoint's document is of this training, and holds the best epoch if that is wanted."""
        same = document["recipe"] == self.recipe.hash
        return same and (self.keep is None or document["best_score"] is not None)


@dataclass(frozen=True)
class Pause:
    """To a worker in mid-job: finish the batch, save a checkpoint, say Paused."""


@dataclass(frozen=True)
class Measure:
    """Time a few steps of each recipe, in this order; begin none after `seconds`, but do the first."""

    number: int
    recipes: tuple[Recipe, ...]
    seconds: float


@dataclass(frozen=True)
class Ready:
    """A worker has opened data, device and weights. `precision` is what "auto" means there."""

    device: str
    precision: Precision
    versions: dict[str, str]
    weights_sha256: str = ""


@dataclass(frozen=True)
class Refused:
    """A worker cannot start: the error to show."""

    error: CaltechHpoError


@dataclass(frozen=True)
class Working:
    """What a job does before its first epoch: `done` of `total`. Needs no answer."""

    job: int
    what: str
    done: int
    total: int


@dataclass(frozen=True)
class EpochPart:
    """What of an epoch is over: so many `images` of the `total` that it trains on."""

    epoch: int
    images: int
    total: int


@dataclass(frozen=True)
class Underway:
    """Where the training of a job is. Needs no answer."""

    job: int
    part: EpochPart


@dataclass(frozen=True)
class EpochDone:
    """An epoch of a job; the worker waits for `answer`. One from `before` the checkpoint is told again."""

    job: int
    result: EpochResult
    before: bool = False


@dataclass(frozen=True)
class Finished:
    """A job ended by itself or because it was told to stop."""

    job: int


@dataclass(frozen=True)
class Paused:
    """A job stopped where its checkpoint is."""

    job: int


@dataclass(frozen=True)
class Measured:
    """What a `Measure` found, of as many recipes as there was time for.

    `peak` bytes of memory (the GPU's, on one) were the most that the worker took so far; the `problem` is
    what kept a recipe from being timed. So many seconds had passed after each recipe: `elapsed`.
    """

    job: int
    times: tuple[StepTime, ...]
    peak: int = 0
    problem: str = ""
    elapsed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Failed:
    """A job ended without a result. "bug" carries a traceback in `message`."""

    job: int
    kind: Literal["out of memory", "refused", "bug"]
    message: str

    @property
    def reason(self) -> str:
        """One line. An error of ours says what happened in its first line, a traceback in its last."""
        line = self.message.strip().splitlines()[0 if self.kind == "refused" else -1]
        return f"{self.kind}: {line}"


@dataclass(frozen=True)
class Died:
    """The worker process of a job ended; `exit_code` is negative for a signal."""

    job: int
    exit_code: int

    @property
    def reason(self) -> str:
        """In words."""
        return f"the worker died (exit code {self.exit_code})"


Midway = Working | Underway  # these need no answer
Event = Midway | EpochDone | Finished | Paused | Measured | Failed | Died


class WorkerBugError(RuntimeError):
    """An error in a worker that is nobody's doing but ours; carries the worker's traceback."""
