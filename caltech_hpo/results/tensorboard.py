"""A search's curves for TensorBoard: one run for each trial, with its parameters and outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caltech_hpo.errors import UsageError
from caltech_hpo.search.events import SearchEvent, TrialEnded, TrialEpoch, TrialResumed, TrialStarted


class TensorBoardLog:
    """Writes what a search tells into `folder`/STUDY/trial-N."""

    def __init__(self, folder: Path, study: str) -> None:
        """Raises UsageError where TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard: tensorboard is not installed", "pip install 'caltech-hpo[tensorboard]'"
            ) from error
        self._make: Any = SummaryWriter
        self._folder = folder / study
        self._writers: dict[int, Any] = {}
        self._params: dict[int, dict[str, Any]] = {}

    def handle(self, event: SearchEvent) -> None:
        """Takes in one event; a trial that goes on continues its run."""
        if isinstance(event, (TrialStarted, TrialResumed)):
            self._params[event.number] = event.params
            if event.number not in self._writers:
                self._writers[event.number] = self._make(str(self._folder / f"trial-{event.number}"))
        elif isinstance(event, TrialEpoch):
            writer, result = self._writers[event.number], event.result
            writer.add_scalar("loss/training", result.training_loss, result.epoch)
            if result.validation_loss is not None:
                writer.add_scalar("loss/validation", result.validation_loss, result.epoch)
            if result.validation_top1 is not None:
                writer.add_scalar("accuracy/validation", result.validation_top1, result.epoch)
            writer.add_scalar("learning rate", result.learning_rate, result.epoch)
        elif isinstance(event, TrialEnded) and event.number in self._writers:
            writer = self._writers.pop(event.number)
            writer.add_hparams(
                self._params[event.number], {"best validation": event.value or 0.0}, run_name="."
            )
            writer.add_text("stop reason", event.stop_reason or event.state)
            writer.close()

    def close(self) -> None:
        """Ends the runs of trials that were paused."""
        for writer in self._writers.values():
            writer.close()
