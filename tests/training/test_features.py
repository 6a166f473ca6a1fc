"""Outputs of a frozen prefix, kept: the same recipe gives the same training with and without them."""

from __future__ import annotations

import errno
import itertools
import os

import numpy as np
import pytest
import torch
from helpers import write_folders

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.errors import DataError
from caltech_hpo.spec import Recipe
from caltech_hpo.timings import views_of
from caltech_hpo.training import features as features_module
from caltech_hpo.training.checkpoint import load_weights, save_weights
from caltech_hpo.training.features import Split, read_features
from caltech_hpo.training.freezing import training_mode
from caltech_hpo.training.loop import evaluate, train
from caltech_hpo.training.prepare import frozen_parts, model_for, prepare
from caltech_hpo.training.sources import FeatureSource, ImageSource, plan_for

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    search = load_search_data(scan(write_folders(folder / "images", images=18)), 68, folder / "cache")
    return (
        Split(((search.open_training(), search.training_cache.stem),)),
        Split(((search.open_validation(), search.validation_cache.stem),)),
    )


def recipe(**changes) -> Recipe:
    values = {
        "architecture": "resnet18", "resize": 68, "crop": 64, "batch_size": 7, "learning_rate": 0.05,
        "epochs": 3, "step_size": 2, "precision": "fp32", "classes": 3, "data": "x",
        "freeze": "features", "augmentation": "center_crop_flip",
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


def run(made, data, folder, *, validation=True):
    *steps, ready = prepare(made, data[0], data[1] if validation else None, CPU, features=folder)
    return ready, list(train(made, ready)), steps


def curve(epochs):
    """Without a score: -1, so that pytest.approx can compare."""
    return [
        tuple(
            -1 if value is None else value
            for value in (e.training_loss, e.validation_loss, e.validation_top1, e.validation_top1_flip)
        )
        for e in epochs
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"augmentation": "center_crop", "test_time_flip": True},
        {"architecture": "alexnet"},  # two dropouts behind the features
        {"architecture": "alexnet", "dropout": 0.2, "frozen_blocks": 3, "freeze": "none"},
        {"freeze": "none", "frozen_blocks": 4},  # a trained batch norm behind the prefix
        {"dropout": 0.5, "ema": 0.9, "head_lr_factor": 3.0, "optimizer": "adamw", "learning_rate": 0.001},
        {"architecture": "efficientnet_lite0", "freeze": "none", "frozen_blocks": 7, "schedule": "cosine"},
        {"fit_on": "train+val"},
        {"architecture": "timm/ghostnet_100"},  # with a dropout of its own, in and before the head
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "resnet18",
)  # fmt: skip
def test_features_change_nothing(data, tmp_path, changes):
    made = recipe(**changes)
    validation = made.fit_on == "train"
    plain, expected, _ = run(made, data, None, validation=validation)
    cached, epochs, steps = run(made, data, tmp_path, validation=validation)
    assert isinstance(plain.training, ImageSource) and isinstance(cached.training, FeatureSource)
    assert steps and steps[-1][1] == steps[-1][2]
    for one, other in zip(curve(epochs), curve(expected), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5)
    ours, theirs = cached.model.state_dict(), plain.model.state_dict()
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=2e-3) for name in theirs)


def test_bf16_features_are_kept_as_they_are(data, tmp_path):
    made = recipe(precision="bf16", epochs=2)
    _, expected, _ = run(made, data, None)
    ready, epochs, _ = run(made, data, tmp_path)
    assert ready.training.views[0].dtype == torch.bfloat16
    assert curve(epochs) == [pytest.approx(values, rel=0.02, abs=1e-3) for values in curve(expected)]


def test_the_saved_model_is_whole(data, tmp_path):
    made = recipe()
    ready, epochs, _ = run(made, data, tmp_path / "features")
    save_weights(ready.model.state_dict(), tmp_path / "model.safetensors")
    again = model_for(made, CPU)
    load_weights(again, tmp_path / "model.safetensors")
    scores = evaluate(again, ImageSource(data[1].images, plan_for(made, CPU)), CPU, "fp32")
    assert scores.top1 == epochs[-1].validation_top1


def test_features_are_computed_once(data, tmp_path, monkeypatch):
    run(recipe(epochs=1), data, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(files) == 3  # training, training mirrored, validation
    monkeypatch.setattr(features_module, "_compute", None)  # would fail if it were called
    run(recipe(epochs=1, learning_rate=0.01, batch_size=5, augmentation="center_crop"), data, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")} == files
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "change", [{"crop": 48}, {"seed": 1}, {"precision": "bf16"}, {"architecture": "resnet34"}]
)
def test_other_features_get_other_files(data, tmp_path, change):
    run(recipe(epochs=1), data, tmp_path)
    before = set(tmp_path.glob("*.npy"))
    run(recipe(epochs=1, **change), data, tmp_path)
    assert len(set(tmp_path.glob("*.npy")) - before) == 3


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({}, 2), ({"augmentation": "center_crop"}, 1), ({"augmentation": "random_crop"}, 0),
        ({"augmentation": "concat"}, 0), ({"mixup": 0.2}, 0), ({"cutmix": 1.0}, 0), ({"erasing": 0.1}, 0),
        ({"color_jitter": 0.1}, 0), ({"label_smoothing": 0.1, "ema": 0.9, "dropout": 0.5}, 2),
    ],
)  # fmt: skip
def test_only_finitely_many_views_are_kept(data, tmp_path, changes, views):
    made = recipe(epochs=1, **changes)
    assert views_of(made) == views
    *_, ready = prepare(made, *data, CPU, features=tmp_path)
    assert isinstance(ready.training, FeatureSource) == bool(views)


@pytest.mark.parametrize("changes", [{"freeze": "none"}, {"freeze": "classifier"}])
def test_without_a_frozen_prefix_nothing_is_kept(data, tmp_path, changes):
    *_, ready = prepare(recipe(**changes), *data, CPU, features=tmp_path)
    assert isinstance(ready.training, ImageSource) and not list(tmp_path.iterdir())


def test_features_larger_than_pixels_are_not_kept(data, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "MOST_BYTES", 511 * 4)
    *_, ready = prepare(recipe(), *data, CPU, features=tmp_path)
    assert isinstance(ready.training, ImageSource) and not list(tmp_path.glob("*.npy"))


def test_an_interrupted_computation_leaves_nothing(data, tmp_path):
    preparing = prepare(recipe(), *data, CPU, features=tmp_path)
    next(preparing)
    preparing.close()
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob("*.tmp"))
    assert len(run(recipe(epochs=1), data, tmp_path)[1]) == 1


def test_workers_share_the_features_and_who_waits_says_so(data, tmp_path, monkeypatch):
    """In silence it would count as hung."""
    monkeypatch.setattr(features_module, "WAIT", 0.01)
    first = prepare(recipe(), *data, CPU, features=tmp_path)
    next(first)  # the lock is its own until it is done
    second = prepare(recipe(), *data, CPU, features=tmp_path)
    waiting = ("waiting for the features of the training images, which another worker computes", 0, 18)
    said = list(itertools.takewhile(lambda step: step != waiting, second))
    assert {what for what, _, _ in said} == {  # what the first one has not begun
        "features of the training images, mirrored", "features of the validation images"
    }  # fmt: skip
    assert next(second) == waiting
    *_, one = first
    *_, other = second
    assert torch.equal(one.training.views[0], other.training.views[0])


def test_a_full_disk_is_an_error_that_says_so(data, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(features_module.os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        run(recipe(), data, tmp_path)
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob("*.tmp"))


def test_a_damaged_file_is_made_again(data, tmp_path):
    _, expected, _ = run(recipe(), data, tmp_path)
    for path in tmp_path.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-100])
    _, epochs, steps = run(recipe(), data, tmp_path)
    assert steps and curve(epochs) == curve(expected)


def test_what_is_read_is_what_the_prefix_gives(data, tmp_path):
    ready, _, _ = run(recipe(epochs=1), data, tmp_path)
    rows = [read_features(path) for path in tmp_path.glob("*.npy")]
    assert all(row.shape == (18, 512) and row.dtype == torch.float32 for row in rows)
    assert any(np.array_equal(row.numpy(), ready.validation.views[0].numpy()) for row in rows)


@pytest.mark.parametrize(
    ("name", "crop"), [("timm/efficientvit_m0", 224), ("timm/dla46_c", 64)]
)  # a batch norm beside the head; a convolution as the head
def test_a_head_that_is_more_than_its_last_layer_keeps_nothing(name, crop):
    made = recipe(architecture=name, crop=crop, resize=256)
    assert frozen_parts(model_for(made, CPU), made) is None


def test_nothing_random_happens_in_a_frozen_prefix():
    made = recipe(architecture="timm/rexnet_100")
    model = model_for(made, CPU)
    prefix, _ = frozen_parts(model, made)
    training_mode(model, prefix)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(prefix(images), prefix(images))
    assert model.get_submodule("head.fc").training
