"""What epochs cost: as they were seen, or as a few timed steps promise."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from caltech_hpo.timings import Kind, StepTime


@dataclass
class Costs:
    """Seconds of setting up and of an epoch, for any kind: as seen or timed, or of the nearest."""

    times: Sequence[StepTime]
    images: tuple[int, int]  # training, validation
    seen: dict[Kind, list[float]] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether anything was timed or seen."""
        return bool(self.times or self.seen)

    def epoch(self, kind: Kind) -> float:
        """Seconds of an epoch."""
        if kind in self.seen:
            return statistics.median(self.seen[kind])
        timed, seen = self._nearest(kind), min(self.seen, key=kind.distance, default=None)
        if seen and (timed is None or (kind.is_like(seen) and not kind.is_like(timed.kind))):
            return statistics.median(self.seen[seen]) * kind.copies / seen.copies
        assert timed is not None, "something was timed or seen"
        return self._timed(kind, timed) * self._correction()

    @property
    def spread(self) -> float:
        """How far apart the timed steps were, as in `StepTime`; 1 once epochs of their kind were seen."""
        spreads = [time.spread for time in self.times if not any(map(time.kind.is_like, self.seen))]
        return statistics.median(spreads) if spreads else 1.0

    def setup(self, kind: Kind) -> float:
        """Seconds before a trial's first epoch."""
        nearest = self._nearest(kind)
        return nearest.setup if nearest else 0.0

    def _nearest(self, kind: Kind) -> StepTime | None:
        return min(self.times, key=lambda time: kind.distance(time.kind), default=None)

    def once(self, kinds: set[Kind]) -> float:
        """Seconds for the outputs of frozen prefixes, computed once for each of them.

        What a training was seen to draw from is there already.
        """
        there: dict[tuple[str, int], int] = defaultdict(int)
        for kind in self.seen:
            prefix = kind.freeze, kind.frozen_blocks
            there[prefix] = max(there[prefix], kind.views)
        found: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
        for time in self.times:
            if time.kind in kinds and time.kind.views > there[time.kind.freeze, time.kind.frozen_blocks]:
                found[time.kind.freeze, time.kind.frozen_blocks].append((time.kind.views, time.once))
        return sum(
            statistics.median(once for _, once in prefix)
            * (max(views for views, _ in prefix) * self.images[0] + self.images[1])
            for prefix in found.values()
        )

    def _timed(self, kind: Kind, nearest: StepTime) -> float:
        share = kind.batch_size / nearest.kind.batch_size
        same_size = nearest.model_copy(update={"kind": kind, "batch": nearest.batch * share})
        return same_size.epoch(*self.images)

    def _correction(self) -> float:
        """What epochs took as a multiple of what the timed steps promised."""
        ratios = [
            statistics.median(found) / self._timed(kind, nearest)
            for kind, found in self.seen.items()
            if (nearest := self._nearest(kind)) and kind.is_like(nearest.kind)
        ]
        return statistics.median(ratios) if ratios else 1.0
