"""The weights of a training's best epoch, held until it ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from caltech_hpo.spec import EpochResult
from caltech_hpo.training.checkpoint import save_weights


class BestWeights:
    """Copies, on the training's device, of what an epoch may change; of the best one above `score`.

    Without validation scores the last epoch is the best.
    """

    def __init__(self, score: float, tensors: dict[str, Tensor] | None = None) -> None:
        """Epochs up to `score`, 0 to 1, are not kept; `tensors` are those of a checkpoint."""
        self.score = score
        self.tensors: dict[str, Tensor] = tensors or {}

    def offer(self, changing: dict[str, Tensor], result: EpochResult, *, last: bool) -> None:
        """Takes the model's changing tensors, by name, if the epoch is the best so far."""
        score = result.validation_top1
        if last if score is None else score > self.score:
            self.score = self.score if score is None else score
            for name, value in changing.items():
                kept = self.tensors.get(name)
                # in place: another copy of all of them would be needed otherwise
                self.tensors[name] = value.detach().clone() if kept is None else kept.copy_(value.detach())

    def save(self, model: nn.Module, path: Path, about: Mapping[str, str] | None = None) -> None:
        """Writes the model's state dictionary with the best epoch's values; `about` is its metadata."""
        save_weights(model.state_dict() | self.tensors, path, about)
