"""How long a row of batches takes, and how much of it they were waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from caltech_hpo.training.device import synchronize

FEWEST_BATCHES = 3  # of a measurement
MOST_AHEAD = 4  # batches that a GPU has been given and has not done
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Timing:
    """`images` in `seconds` after the first batch was there, which took `start`; `wait` of the seconds
    went by while a step waited for its batch (on a GPU, which works meanwhile: while it was made ready)."""

    images: int
    seconds: float
    start: float
    wait: float

    def epoch(self, images: int) -> float:
        """Seconds that an epoch of so many images takes."""
        return self.start + self.seconds * images / self.images


class Limited:
    """Batches until the time is up. The time begins when the first one is there.

    A GPU gets a few batches ahead of what it has done: with a full queue every launch would wait for it,
    also those that make a batch, and what is queued would be computed after the time is up.
    """

    def __init__(self, batches: Iterator[Batch], seconds: float, device: torch.device) -> None:
        self._batches, self._seconds, self._device = batches, seconds, device
        self._begin = self._first = self._end = 0.0
        self._images = self._count = 0
        self._wait = 0.0
        self._ahead: deque[torch.cuda.Event] = deque()

    def __iter__(self) -> Iterator[Batch]:
        synchronize(self._device)
        self._begin = asked = time.perf_counter()
        for batch in self._batches:
            now = time.perf_counter()
            self._first = self._first or now
            self._wait += now - asked if self._count else 0.0
            self._images += len(batch[1])
            self._count += 1
            yield batch
            self._stay_near()
            asked = time.perf_counter()
            if self._count >= FEWEST_BATCHES and asked - self._first >= self._seconds:
                break
        synchronize(self._device)
        self._end = time.perf_counter()

    def _stay_near(self) -> None:
        if self._device.type == "cuda":
            self._ahead.append(torch.cuda.current_stream(self._device).record_event())
            if len(self._ahead) > MOST_AHEAD:
                self._ahead.popleft().synchronize()

    def timing(self) -> Timing:
        """What was measured."""
        return Timing(self._images, self._end - self._first, self._first - self._begin, self._wait)


def timed(batches: Iterator[Batch], step: Callable[[Tensor, Tensor], None], device: torch.device) -> Timing:
    """Takes the step with every batch there is."""
    limited = Limited(batches, float("inf"), device)
    for inputs, labels in limited:
        step(inputs, labels)
    return limited.timing()
