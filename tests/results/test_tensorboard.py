"""What a search tells stands in TensorBoard's files."""

from __future__ import annotations

import pytest

from caltech_hpo.results.tensorboard import TensorBoardLog
from caltech_hpo.search.events import TrialEnded, TrialEpoch, TrialStarted
from caltech_hpo.spec import EpochResult


def test_each_trial_is_a_run_with_its_curves(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoardLog(tmp_path, "demo")
    log.handle(TrialStarted(3, {"learning_rate": 0.1, "augmentation": "center_crop"}, 2, ""))
    for epoch, accuracy in enumerate((0.25, 0.5), start=1):
        result = EpochResult(
            epoch=epoch, learning_rate=0.1, training_loss=1 / epoch, validation_loss=None,
            validation_top1=accuracy, images=9, seconds=1.0,
        )  # fmt: skip
        log.handle(TrialEpoch(3, result, accuracy))
    log.handle(TrialEnded(3, "complete", 0.5, "finished"))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "demo" / "trial-3"))
    events.Reload()
    assert {"loss/training", "accuracy/validation", "learning rate"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("accuracy/validation")] == [(1, 0.25), (2, 0.5)]
    assert "loss/validation" not in events.Tags()["scalars"]
