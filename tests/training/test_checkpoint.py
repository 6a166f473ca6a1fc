"""A training that is interrupted anywhere goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import write_folders

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.spec import Recipe
from caltech_hpo.training.checkpoint import (
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    save_weights,
    weights_metadata,
)
from caltech_hpo.training.checkpoint_files import previous, remove_checkpoint
from caltech_hpo.training.features import Split
from caltech_hpo.training.loop import train
from caltech_hpo.training.memory import with_micro_batch
from caltech_hpo.training.prepare import prepare
from caltech_hpo.training.state import begin, captured, restore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    search = load_search_data(scan(write_folders(folder / "images", images=18)), 40, folder / "cache")
    return Split(((search.open_training(), "a"),)), Split(((search.open_validation(), "b"),))


def recipe(**changes) -> Recipe:
    values = {
        "architecture": "resnet18", "resize": 40, "crop": 32, "batch_size": 6, "learning_rate": 0.002,
        "epochs": 3, "step_size": 1, "precision": "fp32", "classes": 3, "data": "x",
        "augmentation": "random_crop_flip", "dropout": 0.3,
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


def ready(made, splits, folder=None):
    *_, prepared = prepare(made, *splits, CPU, features=folder)
    return prepared


def told(results):
    return [result.model_dump(exclude={"seconds"}) for result in results]


def weights(prepared):
    return {name: value.clone() for name, value in prepared.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


RECIPES = [
    {"optimizer": "adamw", "learning_rate": 0.001, "schedule": "one_cycle", "ema": 0.9},
    {
        "schedule": "cosine",
        "warmup": 0.3,
        "mixup": 0.2,
        "nesterov": True,
        "test_time_flip": True,
        "augmentation": "concat",
        "epochs": 2,
    },
    {"freeze": "features", "augmentation": "center_crop_flip", "head_lr_factor": 3.0},
    {"precision": "bf16", "momentum": 0.0, "epochs": 2},
]


@pytest.mark.parametrize(
    "changes", RECIPES, ids=lambda changes: "-".join(map(str, changes.values())) or "sgd"
)
def test_interrupted_after_any_batch_it_ends_the_same(splits, tmp_path, changes):
    """Stopped at random batches, in training and in validation, each time in a new process's state."""
    made = recipe(**changes)
    features = tmp_path / "features" if "freeze" in changes else None
    whole = ready(made, splits, features)
    expected = list(train(made, whole))
    draw = random.Random(str(changes))
    file, results, stops = tmp_path / "trial.ckpt", [], 0
    while len(results) < made.epochs:
        torch.manual_seed(draw.randrange(1000))  # what another process would have
        prepared = ready(made, splits, features)
        state = begin(made, prepared)
        if stops:
            restore(state, made, prepared, *load_checkpoint(file))
            assert told(state.results) == told(expected[: len(state.results)])
        left = draw.randrange(1, 14)

        def interrupted():
            nonlocal left
            left -= 1
            return left < 0

        for _ in train(made, prepared, state, interrupted=interrupted):
            pass
        results = state.results
        with captured(state, prepared) as found:
            save_checkpoint(file, *found)
        stops += 1
    assert stops > 2 and told(results) == told(expected)
    if not made.ema:  # the averages were swapped in at the last epoch of one, and back in the other
        assert same(weights(prepared), weights(whole))


def test_between_epochs_the_averaged_model_is_out_and_the_trained_one_is_saved(splits, tmp_path):
    made = recipe(ema=0.9)
    whole = list(train(made, ready(made, splits)))
    prepared = ready(made, splits)
    state = begin(made, prepared)
    running = train(made, prepared, state)
    next(running)
    shown = weights(prepared)
    with captured(state, prepared) as found:
        save_checkpoint(tmp_path / "t", *found)
    assert same(weights(prepared), shown)  # looking changed nothing
    again = ready(made, splits)
    state = begin(made, again)
    restore(state, made, again, *load_checkpoint(tmp_path / "t"))
    with (tmp_path / "t").open("r+b") as file:  # what is restored does not stay in the file
        file.write(bytes((tmp_path / "t").stat().st_size))
    assert told(train(made, again, state)) == told(whole[1:]) and told(state.results) == told(whole)


def test_pieces_of_a_batch_go_on_too(splits, tmp_path):
    made = recipe(epochs=2)
    expected = list(train(made, with_micro_batch(ready(made, splits), made, 2)))
    prepared = with_micro_batch(ready(made, splits), made, 2)
    state = begin(made, prepared)
    next(train(made, prepared, state))
    with captured(state, prepared) as found:
        save_checkpoint(tmp_path / "t", *found)
    again = with_micro_batch(ready(made, splits), made, 2)
    state = begin(made, again)
    restore(state, made, again, *load_checkpoint(tmp_path / "t"))
    assert told(train(made, again, state)) == told(expected[1:])


def first_epoch_saved(made, splits, device):
    *_, prepared = prepare(made, *splits, device)
    state = begin(made, prepared)
    next(train(made, prepared, state))
    with captured(state, prepared) as saved:  # before anything else is drawn
        *_, again = prepare(made, *splits, device)
        restored = begin(made, again)
        restore(restored, made, again, *saved)
    return again, restored


def test_what_the_optimizer_remembers_lies_as_its_weights_do(splits):
    """The fused steps on a GPU refuse anything else, and convolutions lie in channels_last."""
    _, restored = first_epoch_saved(recipe(epochs=2), splits, CPU)
    kinds = set()
    for parameter, values in restored.optimizer.state.items():
        for value in values.values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()
                kinds.add(parameter.is_contiguous())
    assert kinds == {True, False}


@pytest.mark.gpu
@pytest.mark.parametrize("changes", RECIPES, ids=lambda changes: "-".join(map(str, changes.values())))
def test_on_a_gpu_it_goes_on_too(tmp_path, changes):
    """AlexNet, since a batch norm over few pixels makes of a rounding another training."""
    search = load_search_data(scan(write_folders(tmp_path / "images", images=18)), 72, tmp_path / "cache")
    splits = Split(((search.open_training(), "a"),)), Split(((search.open_validation(), "b"),))
    alexnet = {"architecture": "alexnet", "init": "kaiming", "resize": 72, "crop": 64, "learning_rate": 0.002}
    slow = {"learning_rate": 1e-4} if changes.get("optimizer") == "adamw" else {}
    made, device = recipe(**alexnet | changes | slow | {"epochs": 2}), torch.device("cuda", 0)
    *_, prepared = prepare(made, *splits, device)
    whole = list(train(made, prepared))
    resumed = list(train(made, *first_epoch_saved(made, splits, device)))
    for one, other in zip(whole[1:], resumed, strict=True):
        assert one.training_loss == pytest.approx(other.training_loss, rel=5e-2)


def test_only_what_changes_is_saved(splits):
    made = recipe(freeze="features")
    prepared = ready(made, splits)
    with captured(begin(made, prepared), prepared) as (tensors, _):
        pass
    learned = {name for name in tensors if name.startswith("model.") and "running" not in name}
    assert {name for name in learned if "num_batches" not in name} == {"model.fc.weight", "model.fc.bias"}


SAVES = [partial(save_checkpoint, document={}), lambda path, tensors: save_weights(tensors, path)]


def checkpoint(number):
    return {"x": torch.full((3,), float(number))}, {"epoch": number, "loss": "NaN"}


def test_the_one_before_is_kept_and_used(tmp_path):
    file = tmp_path / "deep" / "trial.ckpt"
    assert load_checkpoint(file) is None
    save_checkpoint(file, *checkpoint(1))
    save_checkpoint(file, *checkpoint(2))
    assert load_checkpoint(file)[1]["epoch"] == 2 and read_checkpoint(previous(file))[1]["epoch"] == 1
    file.write_bytes(file.read_bytes()[:-1])
    tensors, document = load_checkpoint(file)
    assert document == {"epoch": 1, "loss": "NaN"} and tensors["x"].tolist() == [1, 1, 1]
    file.unlink()  # killed between the two renames
    assert load_checkpoint(file)[1]["epoch"] == 1
    remove_checkpoint(file)
    assert not list(file.parent.iterdir())


def test_flipped_bits_are_noticed(tmp_path):
    file = tmp_path / "trial.ckpt"
    save_checkpoint(file, {"x": torch.arange(200.0)}, {"epoch": 1})
    whole = file.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        assert read_checkpoint(file) is None


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    file = tmp_path / "trial.ckpt"
    save_checkpoint(file, *checkpoint(1))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(file, *checkpoint(2))
    assert load_checkpoint(file)[1]["epoch"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_is_a_safetensors_file(tmp_path):
    """Of any layout and type, of tensors that share memory, and of names and words that look like its own."""
    from safetensors.torch import load_file

    weight = torch.arange(4.0)
    tensors = {
        "one": weight, "again": weight.view(2, 2), "part": weight[1:], "sha256": torch.tensor(1),
        "last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), "none": torch.empty(0, 3),
        "learns": torch.ones(2, requires_grad=True), "yes": torch.tensor([True]),
        "turned": torch.rand(2, 3).T,
        "half": torch.rand(3).bfloat16(), "double": torch.rand(1).double(), "state": torch.get_rng_state(),
    }  # fmt: skip
    document = {"sha256": '"sha256":"', "epoch": 1}
    save_checkpoint(tmp_path / "t", tensors, document)
    found, said = load_checkpoint(tmp_path / "t")
    assert said == document and same(found, tensors) and same(load_file(tmp_path / "t"), tensors)
    assert all(found[name].dtype == value.dtype for name, value in tensors.items())
    save_weights(tensors, tmp_path / "w", {"about": "x"})
    assert same(load_file(tmp_path / "w"), tensors) and weights_metadata(tmp_path / "w") == {"about": "x"}


COPIED = """
import sys
from pathlib import Path

import torch

from caltech_hpo.training.checkpoint import save_checkpoint, save_weights


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


file = Path(sys.argv[1])
save = save_weights if sys.argv[2] == "weights" else lambda tensors, path: save_checkpoint(path, tensors, {})
save({"first": torch.ones(9).view(3, 3).T}, file)  # what is loaded once
# 20 MB each
tensors = {str(i): torch.ones(1000, 1000, 5, 1).to(memory_format=torch.channels_last) for i in range(10)}
Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
before = memory("VmRSS")
save(tensors, file)
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells a process's peak")
def test_what_is_saved_is_not_copied_in_memory(tmp_path, kind):
    """But for one tensor after the other, where it is not laid out row by row."""
    command = [sys.executable, "-c", COPIED, str(tmp_path / "t"), kind]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed is gone
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(ended.stdout) < 50_000  # kB


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limits")
def test_a_file_that_finds_no_room_is_the_systems_error(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for save in SAVES:
            with pytest.raises(OSError, match="File too large") as raised:
                save(tmp_path / "t", {"weights": torch.ones(100_000)})
            assert raised.value.errno == errno.EFBIG and not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
