"""The training loop on images that are easy to learn."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from helpers import write_folders

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.errors import UsageError
from caltech_hpo.spec import Recipe
from caltech_hpo.training.checkpoint import load_weights, save_weights
from caltech_hpo.training.device import (
    autocast,
    has_fast_bf16,
    resolve_device,
    resolve_precision,
)
from caltech_hpo.training.features import Split
from caltech_hpo.training.loop import evaluate, train, train_batches
from caltech_hpo.training.prepare import Prepared, derive_seed, model_for, prepare
from caltech_hpo.training.sources import ImageSource, plan_for
from caltech_hpo.training.state import begin

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    search = load_search_data(scan(write_folders(folder / "images", images=18)), 68, folder / "cache")
    return search.open_training(), search.open_validation()


def recipe(**changes) -> Recipe:
    values = {
        "architecture": "resnet18", "resize": 36, "crop": 32, "batch_size": 6, "learning_rate": 0.02,
        "epochs": 3, "step_size": 2, "precision": "fp32", "classes": 3, "data": "x",
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


def prepared(made: Recipe, data, validation=True, features=None) -> Prepared:
    training, validated = (Split(((images, name),)) for images, name in zip(data, ("a", "b"), strict=True))
    *_, ready = prepare(made, training, validated if validation else None, CPU, features=features)
    return ready


def run(made: Recipe, data, validation=True, features=None):
    ready = prepared(made, data, validation, features)
    return ready.model, list(train(made, ready))


def test_it_learns_and_says_so(data):
    _, epochs = run(recipe(epochs=12, step_size=11), data)
    assert [result.epoch for result in epochs] == list(range(1, 13))
    assert epochs[-1].training_loss < epochs[0].training_loss
    assert epochs[-1].validation_top1 >= 0.9
    assert all(result.images == 18 and result.seconds > 0 for result in epochs)
    assert [round(result.learning_rate, 6) for result in epochs] == [0.02] * 11 + [0.002]


def test_the_same_recipe_gives_the_same_training(data):
    def curve(**changes):
        return [
            (result.training_loss, result.validation_loss, result.validation_top1)
            for result in run(recipe(architecture="alexnet", crop=64, resize=64, epochs=1, **changes), data)[
                1
            ]
        ]

    reference = curve(augmentation="random_crop_flip")
    assert curve(augmentation="random_crop_flip") == reference  # dropout, order and crops included
    assert curve(augmentation="random_crop_flip", seed=1) != reference
    assert curve(augmentation="center_crop_rotation") != reference


def test_training_without_validation(data):
    _, epochs = run(recipe(epochs=1, fit_on="train+val"), data, validation=False)
    assert epochs[0].validation_loss is None and epochs[0].validation_top1 is None


@pytest.mark.parametrize("freeze", ["features", "classifier"])
def test_frozen_parts_do_not_move(data, freeze):
    made = recipe(epochs=1, freeze=freeze)
    before = {name: value.clone() for name, value in model_for(made, CPU).state_dict().items()}
    after = run(made, data)[0].state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("fc.") == (freeze == "features") for name in moved)


def test_evaluation_agrees_with_its_predictions_and_survives_a_file(data, tmp_path):
    made = recipe(epochs=2)
    model, epochs = run(made, data)
    save_weights(model.state_dict(), tmp_path / "deep" / "model.safetensors")
    again = model_for(recipe(seed=5), CPU)
    load_weights(again, tmp_path / "deep" / "model.safetensors")
    scores = evaluate(again, ImageSource(data[1], plan_for(made, CPU)), CPU, "fp32")
    assert scores.top1 == epochs[-1].validation_top1
    assert scores.loss == pytest.approx(epochs[-1].validation_loss)
    assert scores.top1 == float((scores.predictions == scores.labels).double().mean())
    assert scores.labels.tolist() == data[1].labels.tolist()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.safetensors"]


def test_a_huge_learning_rate_gives_a_loss_that_is_not_finite(data):
    _, epochs = run(recipe(architecture="alexnet", crop=64, resize=64, learning_rate=1e4, epochs=2), data)
    assert not math.isfinite(epochs[-1].training_loss)


def test_bf16_trains_too(data):
    _, epochs = run(recipe(precision="bf16", epochs=4), data)
    assert epochs[-1].training_loss < epochs[0].training_loss


def test_seeds_of_different_purposes_differ():
    seeds = {derive_seed(s, p, e) for s in range(5) for p in ("order", "dropout") for e in range(5)}
    assert len(seeds) == 50 and all(0 <= seed < 2**63 for seed in seeds)


def test_devices_and_precision():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:99", "cpu:1", "cuda:x", ""):
        with pytest.raises(UsageError, match="auto"):
            resolve_device(name)
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("auto", CPU) == ("bf16" if has_fast_bf16(CPU) else "fp32")


def test_scoring_keeps_no_batchs_output(data):
    """Small ones, left where the batch before was, made each batch take new memory on a CPU."""

    class Watched(torch.nn.Module):
        def forward(self, images):
            outputs.append(weakref.ref(made := images.mean((2, 3))))
            alive.append(sum(output() is not None for output in outputs))
            return made

    outputs, alive = [], []
    source = ImageSource(data[1], plan_for(recipe(batch_size=2), CPU))
    scores = evaluate(Watched(), source, CPU, "fp32")
    assert len(scores.predictions) == len(data[1]) and len(alive) > 3
    assert max(alive) == 2  # this one, and the one before as long as this is made


@pytest.mark.gpu
def test_training_on_a_gpu(data):
    device = torch.device("cuda", 0)
    made = recipe(epochs=4, precision="auto")
    training, validation = (Split(((images, name),)) for images, name in zip(data, ("a", "b"), strict=True))
    *_, ready = prepare(made, training, validation, device)
    epochs = list(train(made, ready))
    assert epochs[-1].training_loss < epochs[0].training_loss
    state = begin(made, ready)
    torch.cuda.set_sync_debug_mode("error")  # nothing waits for the GPU between batches
    try:
        train_batches(made, ready, state, ready.training.training(state.order, state.draws))
        ready.runs.eval()
        with torch.inference_mode(), autocast(device, resolve_precision("auto", device)):
            for inputs, _ in ready.validation.evaluation():
                ready.runs(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
