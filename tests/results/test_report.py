"""The table: published values beside ours, rows not run said to be so; plots are drawn from records."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from caltech_hpo.results.ledger import FinalResult, old_row
from caltech_hpo.results.plots import draw_confusion, draw_study_curves, draw_training_curves
from caltech_hpo.results.report import report_rows
from caltech_hpo.search.records import TrialRecord
from caltech_hpo.search.space import Binding, recipe_for
from caltech_hpo.spec import EpochResult
from caltech_hpo.study_files import complete_params, load_study

SPEC = load_study("alexnet-scratch")


def curve(*accuracies):
    return tuple(
        EpochResult(
            epoch=i, learning_rate=0.1, training_loss=1 / i, validation_loss=1.0,
            validation_top1=accuracy, images=10, seconds=1.0,
        )
        for i, accuracy in enumerate(accuracies, start=1)
    )  # fmt: skip


def record(number, state="complete", baseline="", value=0.5, params=None, **changes):
    values = {
        "number": number, "state": state, "params": params or complete_params(SPEC, {}), "value": value,
        "best_epoch": 2, "final_loss": 0.25, "seconds": 2.0, "baseline": baseline, "stop_reason": "finished",
        "device": "cpu", "precision": "bf16", "recipe": None, "epochs": curve(0.1, value),
    }  # fmt: skip
    return TrialRecord.model_validate(values | changes)


def final(trial, fit_on="train", recipe_hash="h"):
    return FinalResult(
        study="s", trial=trial, params={}, best_epoch=1, val_accuracy=0.5, test_accuracy=0.51,
        test_mean_per_class_accuracy=0.4, test_images=100, ci95=(0.4, 0.6), fit_on=fit_on, model="m",
        recipe_hash=recipe_hash,
    )  # fmt: skip


def test_baselines_stand_first_beside_their_published_values():
    best = SPEC.baselines[0].name
    records = [
        record(0, value=0.6),
        record(1, state="failed", baseline=best, value=None),
        record(2, baseline=best, value=0.497),
        record(3, state="pruned", value=0.2, final_loss=float("nan")),
        record(4, state="waiting", value=None),
    ]
    binding = Binding(classes=101, data="x", seed=0, precision="bf16")
    recipes = [recipe_for(SPEC, complete_params(SPEC, {"learning_rate": 0.01 * n}), binding) for n in (1, 2)]
    records[0] = records[0].model_copy(update={"recipe": recipes[0]})
    records[2] = records[2].model_copy(update={"recipe": recipes[1]})
    scores = [
        old_row("s", final(2, recipe_hash=recipes[1].hash), records[2]),
        old_row("s", final(0, "train+val", recipe_hash="h"), records[0]),
        old_row("s", final(3, recipe_hash="another trial 3, of a study that was deleted"), records[3]),
    ]
    rows = report_rows(SPEC, records, scores)
    assert len(rows) == 6 + 3  # six baselines; the failed try of one, and two trials; none for a waiting one
    assert (rows[0].trial, rows[0].val_accuracy, rows[0].test_accuracy) == (2, 0.497, 0.51)
    assert (rows[0].published.validation, rows[0].published.test) == (0.55, 0.54)
    assert all(row.state == "not run" and row.trial is None and row.val_accuracy is None for row in rows[1:6])
    assert rows[1].published.outcome == "diverges" and rows[1].params["learning_rate"] == 0.1
    assert [row.trial for row in rows[6:]] == [0, 3, 1]
    assert rows[7].test_accuracy is None
    assert rows[7].final_loss is None  # NaN is no JSON number
    assert rows[6].test_accuracy is None  # scored, but with the validation images trained on
    assert rows[6].params["freeze"] == "none"


@pytest.mark.parametrize("classes", [3, 101, 150])
def test_plots_are_pictures(tmp_path, classes):
    names = [f"class [{i}]" for i in range(classes)]
    matrix = np.eye(classes, dtype=np.int64)
    matrix[0] = 0  # a class without a test image
    paths = [
        draw_confusion(matrix, names, "t", tmp_path / "confusion.png"),
        draw_training_curves(curve(0.1, 0.5, 0.4), "t", tmp_path / "new" / "curves.png"),
        draw_study_curves([record(i, value=i / 20) for i in range(15)], "t", tmp_path / "study.png"),
    ]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 300
            assert image.convert("L").getextrema()[0] < 100
    assert not list(tmp_path.rglob("*.tmp"))


def test_curves_without_validation(tmp_path):
    epochs = [
        e.model_copy(update={"validation_loss": None, "validation_top1": None}) for e in curve(0.1, 0.2)
    ]
    assert draw_training_curves(epochs, "t", tmp_path / "c.png").stat().st_size > 5000
