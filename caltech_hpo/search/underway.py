"""Where a training is in mid-epoch, told every few seconds: an epoch may take minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from caltech_hpo.search.messages import Underway

if TYPE_CHECKING:
    from caltech_hpo.training.state import TrainingState

TELL_EVERY = 2.0  # seconds; an epoch that is faster tells of itself


def nobody(event: Underway) -> None:
    """Nobody listens."""


def telling(
    job: int, state: TrainingState, total: int, interrupted: Callable[[], bool],
    tell: Callable[[Underway], None],
) -> Callable[[], bool]:  # fmt: skip
    """The same as `interrupted`, which a training asks after every batch; tells where it is now and then.

    `total` is how many images an epoch trains on.
    """
    told, epoch = time.monotonic(), state.epoch

    def asked() -> bool:
        nonlocal told, epoch
        now = time.monotonic()
        if state.epoch != epoch:  # whose end was told
            told, epoch = now, state.epoch
        elif now - told >= TELL_EVERY:
            told = now
            tell(Underway(job, epoch, state.images, total))
        return interrupted()

    return asked
