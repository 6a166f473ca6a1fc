"""What a search tells its caller while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from caltech_hpo.search.messages import EpochPart
from caltech_hpo.spec import EpochResult


@dataclass(frozen=True)
class TrialStarted:
    """A worker has begun a trial."""

    number: int
    params: dict[str, Any]
    epochs: int
    baseline: str


@dataclass(frozen=True)
class TrialWorking:
    """What a trial does before its first epoch: `done` of `total`."""

    number: int
    what: str
    done: int
    total: int


@dataclass(frozen=True)
class TrialUnderway:
    """Where the training of a trial is."""

    number: int
    part: EpochPart


@dataclass(frozen=True)
class TrialEpoch:
    """An epoch of a trial is in the database."""

    number: int
    result: EpochResult
    best: float


@dataclass(frozen=True)
class TrialEnded:
    """A trial is told. `state` is "complete", "pruned" or "failed"; `value` the best accuracy."""

    number: int
    state: str
    value: float | None
    stop_reason: str


@dataclass(frozen=True)
class Requeued:
    """A trial that an earlier search left unfinished will be run again from its start."""

    number: int


@dataclass(frozen=True)
class TrialResumed:
    """A trial goes on from its checkpoint (or from its start, where it has none): after its worker died, or
    after an earlier search left it. `done` of its `epochs` are in the database; `lost`: its worker died."""

    number: int
    params: dict[str, Any]
    epochs: int
    done: int
    baseline: str
    lost: bool = False


@dataclass(frozen=True)
class TrialPaused:
    """A trial is left where it is; a worker that is free later, or the next search, goes on with it.

    Not `saved`: its worker had no time to, and it will go on from an earlier checkpoint.
    """

    number: int
    saved: bool = True


@dataclass(frozen=True)
class NoRoom:
    """The search waits until there is room for its database."""

    message: str


SearchEvent = (
    TrialStarted
    | TrialWorking
    | TrialUnderway
    | TrialEpoch
    | TrialEnded
    | TrialResumed
    | TrialPaused
    | Requeued
    | NoRoom
)
