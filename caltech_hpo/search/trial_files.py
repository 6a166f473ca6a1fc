"""What the trials of a study leave on disk: checkpoints while they run, then the best one's weights."""

from __future__ import annotations

import re
from pathlib import Path

from caltech_hpo.data.cache import sync_folder
from caltech_hpo.search.messages import Job
from caltech_hpo.search.running import Running
from caltech_hpo.training.checkpoint_files import is_abandoned, previous, remove_checkpoint


def best_weights(models: Path, study: str) -> list[Path]:
    """The files with the weights of a study's best trial: one, or none before a trial was complete."""
    name = re.compile(rf"{re.escape(study)}-best-trial[0-9]+\.safetensors")
    return [path for path in sorted(models.glob(f"{study}-best-trial*")) if name.fullmatch(path.name)]


class TrialFiles:
    """The files of one study's trials. Without a folder for checkpoints there are none."""

    def __init__(self, study: str, checkpoints: Path | None, models: Path | None, best: float) -> None:
        """`best` is the highest value of the complete trials, -1 without one."""
        self._study, self._checkpoints, self._models, self._best = study, checkpoints, models, best
        self._ended: list[tuple[int, float | None]] = []

    def job(self, running: Running) -> Job:
        """The training that goes on where the trial stands; a new best leaves its weights."""
        number = running.trial.number
        keep = self._weights(number) if self._models else None
        checkpoint, known = self._checkpoint(number), len(running.results)
        return Job(number, running.recipe, keep, checkpoint, known, self._best)

    def lack_weights(self, running: Running) -> bool:
        """Whether a trial with all its epochs was ended before its weights, the best ones, were written."""
        number, best = running.trial.number, running.best
        checkpoint, weights = self._checkpoint(number), self._weights(number)
        if checkpoint is None or weights is None or self._models is None or best is None:
            return False
        made = weights.exists() or self._target(self._models, number).exists()
        there = checkpoint.exists() or previous(checkpoint).exists()
        return (best.validation_top1 or 0.0) > self._best and not made and there

    def tidy(self, running: set[int]) -> None:
        """Removes what killed processes left: of trials that do not run any more, and half-written files."""
        if self._checkpoints is None or not self._checkpoints.is_dir():
            return
        for file in self._checkpoints.glob("trial-*"):
            number = file.name.removeprefix("trial-").partition(".")[0]
            if number.isdigit() and (int(number) not in running or is_abandoned(file)):
                file.unlink(missing_ok=True)

    def ended(self, number: int, value: float | None) -> None:
        """Notes that a trial has ended; `value` is a complete one's."""
        self._ended.append((number, value))

    def settle(self) -> None:
        """Puts away what ended trials have left. Call it when their ends are in the database."""
        for number, value in self._ended:
            weights, checkpoint = self._weights(number), self._checkpoint(number)
            if weights is None or checkpoint is None:
                continue
            if value is not None and value > self._best:
                self._best = value
                if weights.exists() and self._models is not None:
                    self._publish(weights, self._target(self._models, number))
            weights.unlink(missing_ok=True)
            remove_checkpoint(checkpoint)
        self._ended.clear()

    def _publish(self, weights: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        before = best_weights(target.parent, self._study)
        weights.replace(target)
        sync_folder(target.parent)
        for older in before:
            if older != target:
                older.unlink(missing_ok=True)

    def _checkpoint(self, number: int) -> Path | None:
        return None if self._checkpoints is None else self._checkpoints / f"trial-{number}.checkpoint"

    def _weights(self, number: int) -> Path | None:
        return None if self._checkpoints is None else self._checkpoints / f"trial-{number}.safetensors"

    def _target(self, models: Path, number: int) -> Path:
        return models / f"{self._study}-best-trial{number}.safetensors"
