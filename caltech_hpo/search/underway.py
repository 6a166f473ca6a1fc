"""Where a training is in mid-epoch, told every few seconds: an epoch may take minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from caltech_hpo.search.messages import EpochPart, Underway

if TYPE_CHECKING:
    from caltech_hpo.training.state import TrainingState

TELL_EVERY = 5.0  # seconds; an epoch that is faster tells of itself
# Parts of what an epoch has taken: hours of it are a few hundred messages, so that a worker whose
# supervisor reads nothing (it may wait for room on the disk) never waits for it in mid-epoch.
PARTS = 50


def nobody(event: Underway) -> None:
    """Nobody listens."""


def telling(
    job: int, state: TrainingState, total: int, interrupted: Callable[[], bool],
    tell: Callable[[Underway], None],
) -> Callable[[], bool]:  # fmt: skip
    """The same as `interrupted`, which a training asks after every batch; tells where it is now and then.

    `total` is how many images an epoch trains on. What is returned keeps the state alive.
    """
    epoch = state.epoch
    began = told = time.monotonic()

    def asked() -> bool:
        nonlocal epoch, began, told
        now = time.monotonic()
        if state.epoch != epoch:  # whose end was told
            epoch, began, told = state.epoch, now, now
        elif now - told >= max(TELL_EVERY, (now - began) / PARTS):
            told = now
            tell(Underway(job, EpochPart(epoch, state.images, total)))
        return interrupted()

    return asked
