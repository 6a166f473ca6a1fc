"""Memory never ends a search: a batch that does not fit is computed in pieces."""

from __future__ import annotations

import gc
import itertools
import platform
import resource
import subprocess
import sys
import weakref

import pytest
import torch
from helpers import write_folders
from hypothesis import given
from hypothesis import strategies as st

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.spec import Recipe
from caltech_hpo.training import memory as memory_module
from caltech_hpo.training import memory_estimate, system_memory
from caltech_hpo.training.features import Split
from caltech_hpo.training.loop import train
from caltech_hpo.training.memory import (
    MicroBatches,
    _kind,
    fewest_images,
    halve_until,
    with_micro_batch,
)
from caltech_hpo.training.memory_estimate import needed_bytes
from caltech_hpo.training.prepare import prepare
from caltech_hpo.training.system_memory import free_memory, is_out_of_memory, memory_share

CPU = torch.device("cpu")
MANY = 1 << 50


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    search = load_search_data(scan(write_folders(folder / "images", images=18)), 68, folder / "cache")
    return Split(((search.open_training(), "a"),)), Split(((search.open_validation(), "b"),))


def recipe(**changes) -> Recipe:
    values = {
        "architecture": "timm/convnext_atto", "resize": 68, "crop": 64, "batch_size": 8,
        "epochs": 2, "precision": "fp32", "classes": 3, "data": "x", "dropout": 0.0, "learning_rate": 0.02,
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


def ready(made, splits, folder=None):
    *_, prepared = prepare(made, *splits, CPU, features=folder)
    return prepared


def curve(made, prepared):
    return [
        (e.training_loss, e.validation_loss, e.validation_top1, e.micro_batch) for e in train(made, prepared)
    ]


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.2, "label_smoothing": 0.1}, {"freeze": "features"}])
@pytest.mark.parametrize("images", [1, 3])
def test_pieces_add_up_to_the_batch(splits, tmp_path, changes, images):
    made = recipe(**changes)
    folder = tmp_path if "freeze" in changes else None
    whole = curve(made, ready(made, splits, folder))
    pieces = curve(made, with_micro_batch(ready(made, splits, folder), made, images))
    for one, other in zip(whole, pieces, strict=True):
        assert one[:3] == pytest.approx(other[:3], rel=2e-4)
        assert (one[3], other[3]) == (None, images)


def test_an_estimate_has_the_model_and_the_gradient_that_a_piece_adds(splits, monkeypatch):
    """That of the layer with most weights: VGG16's takes 0.4 GiB beside what earlier pieces have left."""
    monkeypatch.setattr(memory_estimate, "MARGIN", 0)
    monkeypatch.setattr(memory_estimate, "SCRATCH", 0)
    made = recipe(batch_size=8)
    prepared = ready(made, splits)
    parameters = [p.nbytes for p in prepared.model.parameters()]
    # the model, its gradients, the momentum, the best epoch's, and a copy for the optimizer's step
    assert needed_bytes(made, prepared)(8) == 5 * sum(parameters)
    assert needed_bytes(made, prepared)(7) == 5 * sum(parameters) + max(parameters)


def test_frozen_layers_take_memory_while_they_run(splits, monkeypatch, tmp_path):
    """They keep nothing for a backward pass; where their outputs are stored, they do not run."""
    made = recipe(freeze="features", batch_size=16)
    running = ready(made, splits)
    passing = needed_bytes(made, running)(16)
    stored = needed_bytes(made, ready(made, splits, tmp_path))(16)
    monkeypatch.setattr(memory_estimate, "PASSING", 0)
    layer = 16 * 64 * 64 * 3 * 4  # the first one takes the images
    assert passing > needed_bytes(made, running)(16) + memory_estimate.MARGIN * layer and passing > 2 * stored
    modules = list(running.runs.modules())
    assert not any(module._forward_hooks for module in modules)
    with monkeypatch.context() as failing, pytest.raises(ZeroDivisionError):
        failing.setattr(memory_estimate, "saved_bytes", lambda *given: 1 // 0)
        needed_bytes(made, running)(16)
    assert not any(module._forward_hooks for module in modules)


@given(batch=st.integers(1, 1000), room=st.integers(0, 1000), fewest=st.integers(1, 2))
def test_halving_finds_the_first_size_that_fits(batch, room, fewest):
    tried = []

    def attempt(images):
        tried.append(images)
        if images > room:
            raise torch.OutOfMemoryError(str(images))

    if room < min(batch, fewest):
        with pytest.raises(torch.OutOfMemoryError):
            halve_until(attempt, batch, fewest)
        return
    found = halve_until(attempt, batch, fewest)
    assert found <= room and found == tried[-1] and tried[0] == batch
    assert all(later == max(fewest, size // 2) for size, later in itertools.pairwise(tried))


def test_counting_keeps_nothing(splits):
    """A circle through autograd's graph would stay for good: VGG16's rows left 1.5 GB."""
    made = recipe(batch_size=16)
    prepared = ready(made, splits)
    seen = []
    for module in prepared.runs.modules():
        module.register_forward_hook(lambda *given: seen.append(weakref.ref(given[-1])))
    assert needed_bytes(made, prepared)(4) > 0
    assert len(seen) > 40 and not any(output() is not None for output in seen)


def test_another_error_is_no_lack_of_memory():
    def attempt(images):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        halve_until(attempt, 8, 1)


def test_a_limit_decides_the_images_at_a_time_once_a_kind(splits, monkeypatch):
    made = recipe(batch_size=16)
    prepared = ready(made, splits)
    three, four = (needed_bytes(made, prepared)(images) for images in (3, 4))
    assert three < four
    batches = MicroBatches(CPU, four)
    assert batches.fit(made, prepared).micro_batch == 4
    monkeypatch.setattr(memory_module, "needed_bytes", None)  # would fail if it were called
    fitted = batches.fit(recipe(batch_size=16, learning_rate=0.001, seed=3), prepared)
    assert fitted.micro_batch == 4 and fitted.validation.plan.batch_size == 4
    assert fitted.training.plan.batch_size == 16  # a step is still a batch's
    assert [epoch.micro_batch for epoch in train(made, fitted)] == [4, 4]
    assert batches.shrink(made, prepared) and batches.fit(made, prepared).micro_batch == 2


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 4}, {"freeze": "features"}, {"frozen_blocks": 2}, {"crop": 68}, {"optimizer": "adamw"}],
)
def test_another_kind_is_looked_at_again(splits, change, monkeypatch):
    looked = []
    monkeypatch.setattr(memory_module, "needed_bytes", lambda *given: looked.append(given) or int)
    batches = MicroBatches(CPU, MANY)
    for made in (recipe(), recipe(**change)):
        batches.fit(made, ready(made, splits))
    assert len(looked) == 2


def test_too_little_for_one_image_says_what_is_needed(splits):
    made = recipe()
    with pytest.raises(torch.OutOfMemoryError, match=r"1 image at a time needs about .* MiB"):
        MicroBatches(CPU, 1 << 20).fit(made, ready(made, splits))


@pytest.mark.parametrize("architecture", ["resnet18", "timm/convnext_atto"])
def test_looking_changes_nothing(splits, architecture):
    made = recipe(architecture=architecture, dropout=0.3, crop=64)
    plain = curve(made, ready(made, splits))
    looked_at = MicroBatches(CPU, MANY).fit(made, ready(made, splits))
    assert looked_at.micro_batch is None and curve(made, looked_at) == plain


def test_a_batch_norm_that_learns_needs_two_images(splits):
    assert fewest_images(ready(recipe(), splits).runs) == 1
    assert fewest_images(ready(recipe(architecture="resnet18"), splits).runs) == 2
    assert fewest_images(ready(recipe(architecture="resnet18", freeze="features"), splits).runs) == 1


def test_the_estimate_grows_with_images_and_what_learns(splits):
    base = needed_bytes(recipe(), ready(recipe(), splits))(8)
    for changes, images in (({}, 16), ({"optimizer": "adamw"}, 8), ({"ema": 0.9}, 8)):
        made = recipe(**changes)
        assert needed_bytes(made, ready(made, splits))(images) > base
    frozen = recipe(freeze="features")
    assert needed_bytes(frozen, ready(frozen, splits))(8) < base


def test_a_gpu_is_told_what_a_worker_may_take(monkeypatch):
    told = []
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)  # the images
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: told.append(given))
    assert memory_share(gpu, None, 1) == 640 and not told  # alone: cuDNN may try what it likes
    assert memory_share(gpu, None, 4) == 160 and told.pop() == (0.26, gpu)
    assert memory_share(gpu, 200, 4) == 100 and told.pop() == (0.2, gpu)  # the images are in it
    assert memory_share(gpu, 25, 4) == 0 and told.pop() == (0.1, gpu)


def test_every_word_for_too_little_memory_is_known():
    for words in (
        "CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "FIND was unable to find an engine to execute this computation", "Triton Error [CUDA]: out of memory",
    ):  # fmt: skip
        assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("CUDNN_STATUS_BAD_PARAM"))


def test_a_gpu_scores_many_images_at_once(splits, monkeypatch):
    """As many as half of the memory would train, and never fewer than a training batch."""
    made = recipe(batch_size=8)
    *_, prepared = prepare(made, *splits, CPU)
    sizes = []
    for limit in (1 << 40, 100 << 10, 1 << 10):
        memory = MicroBatches(torch.device("cuda", 0), limit)

        def step(recipe, prepared, images, memory=memory):
            memory._image_bytes[_kind(recipe, prepared)] = 2 << 10

        monkeypatch.setattr(memory, "_train_once", step)
        sizes.append(memory.fit(made, prepared).validation.plan.batch_size)
    assert sizes == [512, 25, 8]


def test_workers_share_what_is_free(tmp_path, monkeypatch):
    assert free_memory(CPU) > 1 << 20
    assert memory_share(CPU, 250, 4) == 250
    assert memory_share(CPU, None, 2) <= 0.4 * (free_memory(CPU) + (1 << 30))
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(system_memory, "CGROUP", tmp_path)
    assert free_memory(CPU) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 1 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_taken_again_without_asking_the_system(kept):
    """Pages that a later tensor of 64 MiB had to be given by the kernel, in a process of its own."""
    code = """
import resource, sys, torch
from caltech_hpo.training.system_memory import keep_freed_memory, release_freed_memory
def pages(make):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    make()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1])
if sys.argv[1] == "True":
    keep_freed_memory(torch.device("cpu"))
make = lambda: torch.ones(1 << 24)
first = pages(make)
for _ in range(20):  # until the heap has found its size
    make()
second = pages(make)
held = resident()
release_freed_memory(torch.device("cpu"))
print(first, second, held - resident())
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(kept)], capture_output=True, text=True, check=True
    )
    first, second, released = (int(word) for word in ended.stdout.split())
    whole = (1 << 26) // resource.getpagesize()
    assert first > whole / 2
    assert second < whole / 50 if kept else second > whole / 2
    assert released > whole / 2 if kept else released < whole / 2


@pytest.mark.gpu
def test_a_gpu_is_asked_by_trying(splits):
    device = torch.device("cuda", 0)
    made = recipe(architecture="vgg16", crop=64, batch_size=512)
    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests left would count as images
    share = memory_share(device, 4 << 30, 1)
    try:
        *_, prepared = prepare(made, *splits, device)
        fitted = MicroBatches(device, share).fit(made, prepared)
        assert 1 <= fitted.micro_batch < 512
        assert len(list(train(made, fitted))) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
