"""What the trials of a study leave on disk: checkpoints while they run, then the best one's weights."""

from __future__ import annotations

import math
import re
from pathlib import Path

from caltech_hpo.data.cache import sync_folder
from caltech_hpo.search.messages import Job
from caltech_hpo.search.running import Running
from caltech_hpo.training.checkpoint_files import has_checkpoint, is_abandoned, remove_checkpoint

NONE_BETTER = (-1.0, 0)  # the rank of no trial
SHORT = 120.0  # seconds of training that may be repeated for the sake of weights


def best_weights(models: Path, study: str) -> list[Path]:
    """The files with the weights of a study's best trial: one, or none before a trial was complete."""
    name = re.compile(rf"{re.escape(study)}-best-trial[0-9]+\.safetensors")
    return [path for path in sorted(models.glob(f"{study}-best-trial*")) if name.fullmatch(path.name)]


class TrialFiles:
    """The files of one study's trials. Without a folder for checkpoints there are none."""

    def __init__(
        self, study: str, checkpoints: Path | None, models: Path | None, best: tuple[float, int]
    ) -> None:
        """`best` is (value, -number) of the best complete trial, the earliest of equals; or NONE_BETTER."""
        self._study, self._checkpoints, self._models, self._best = study, checkpoints, models, best
        self._ended: list[tuple[int, float | None]] = []

    def job(self, running: Running) -> Job:
        """The training that goes on where the trial stands; a new best leaves its weights."""
        number, (best, earlier) = running.trial.number, self._best
        keep = self._weights(number) if self._models else None
        above = best if -number < earlier else math.nextafter(best, -1.0)
        return Job(number, running.recipe, keep, self._checkpoint(number), len(running.results), above)

    def lack_weights(self, running: Running) -> bool:
        """Whether a trial with all its epochs was ended before its weights, the best ones, were written.

        Without a checkpoint only a short training is worth its repetition.
        """
        number, best = running.trial.number, running.best
        checkpoint, weights = self._checkpoint(number), self._weights(number)
        if checkpoint is None or weights is None or self._models is None or best is None:
            return False
        made = weights.exists() or self._target(self._models, number).exists()
        cheap = sum(result.seconds for result in running.results) < SHORT
        there = cheap or has_checkpoint(checkpoint)
        return (best.validation_top1 or 0.0, -number) > self._best and not made and there

    def tidy(self, running: set[int]) -> None:
        """Removes what killed processes left: of trials that do not run any more, and half-written files.

        What the best trial left was not put away any more when its search was killed: now it is.
        """
        if self._checkpoints is None or not self._checkpoints.is_dir():
            return
        if self._best != NONE_BETTER:
            self._publish(-self._best[1])
        still = running | {number for number, _ in self._ended}
        for file in self._checkpoints.glob("trial-*"):
            number = file.name.removeprefix("trial-").partition(".")[0]
            if number.isdigit() and (int(number) not in still or is_abandoned(file)):
                file.unlink(missing_ok=True)

    def ended(self, number: int, value: float | None) -> None:
        """Notes that a trial has ended; `value` is a complete one's."""
        self._ended.append((number, value))

    def settle(self) -> None:
        """Puts away what ended trials have left. Call it when their ends are in the database."""
        while self._ended:
            number, value = self._ended[0]
            weights, checkpoint = self._weights(number), self._checkpoint(number)
            if weights is not None and checkpoint is not None:
                if value is not None and (value, -number) > self._best:
                    self._publish(number)
                weights.unlink(missing_ok=True)
                remove_checkpoint(checkpoint)
            if value is not None:
                self._best = max(self._best, (value, -number))
            del self._ended[0]

    def _publish(self, number: int) -> None:
        weights = self._weights(number)
        if weights is None or self._models is None or not weights.exists():
            return
        target = self._target(self._models, number)
        self._models.mkdir(parents=True, exist_ok=True)
        before = best_weights(self._models, self._study)
        weights.replace(target)
        sync_folder(self._models)
        for older in before:
            if older != target:
                older.unlink(missing_ok=True)

    def _checkpoint(self, number: int) -> Path | None:
        return None if self._checkpoints is None else self._checkpoints / f"trial-{number}.checkpoint"

    def _weights(self, number: int) -> Path | None:
        return None if self._checkpoints is None else self._checkpoints / f"trial-{number}.safetensors"

    def _target(self, models: Path, number: int) -> Path:
        return models / f"{self._study}-best-trial{number}.safetensors"
