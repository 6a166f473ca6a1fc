"""Images in a device's memory give the batches that images in the cache file give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from caltech_hpo.data.augment import AUGMENTATIONS
from caltech_hpo.data.batches import HALF, BatchPlan, evaluation_batches, training_batches
from caltech_hpo.data.cache import LabeledImages
from caltech_hpo.data.resident import make_resident, resident_bytes, resize_weights, to_device

CPU = torch.device("cpu")
SIZES = [(40, 56), (64, 40), (40, 40), (97, 40), (40, 71)]


def noise(sizes=SIZES, *, seed: int = 0) -> LabeledImages:
    random = np.random.default_rng(seed)
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return LabeledImages(images, np.arange(len(sizes), dtype=np.int64))


def epoch(data, plan: BatchPlan):
    order, draws = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    return list(training_batches(data, plan, order, draws))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_are_the_same_wherever_the_pixels_are(augmentation, device):
    data = noise()
    here = torch.device(device)
    plan = BatchPlan(2, 32, HALF, here, AUGMENTATIONS[augmentation], erasing=0.5, mixup=0.2, classes=5)
    for (ours, shares), (theirs, expected) in zip(
        epoch(make_resident(data, here), plan), epoch(data, plan), strict=True
    ):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        exact = not AUGMENTATIONS[augmentation].resized and device == "cpu"
        # Pillow computes a resize in integers: a level or two of 255 may differ
        assert (ours - theirs).abs().max() <= (0 if exact else 2.01 / 127.5)
        assert torch.equal(shares, expected)


def test_evaluation_is_the_same_and_splits_concatenate():
    first, second = noise(), noise(SIZES[::-1], seed=1)
    plan = BatchPlan(3, 32, HALF, CPU)
    joined = make_resident(first, CPU) + make_resident(second, CPU)
    assert len(joined) == 10 and resident_bytes(first + second) == joined.pixels.numel()
    for ours, theirs in zip(
        evaluation_batches(joined, plan), evaluation_batches(first + second, plan), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("piece", [1, 1500, 4000])
def test_images_are_copied_in_pieces(piece, monkeypatch):
    monkeypatch.setattr("caltech_hpo.data.resident.PIECE", piece)
    data = noise()
    copied = make_resident(data, CPU).pixels
    assert torch.equal(copied, torch.from_numpy(np.concatenate([one.reshape(-1, 3) for one in data.images])))


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 90), width=st.integers(1, 90), crop=st.integers(2, 64), seed=st.integers(0, 99))
def test_a_resize_agrees_with_pillow(height, width, crop, seed):
    data = noise([(90, 90), (height, width)], seed=seed)
    boxes = torch.tensor([[0, 0, 90, 90], [0, 0, height, width]])
    ours = make_resident(data, CPU).resized(torch.arange(2), boxes, crop).numpy()
    for mine, image in zip(ours, data.images, strict=True):
        pillow = np.asarray(Image.fromarray(image).resize((crop, crop), Image.Resampling.BILINEAR))
        apart = np.abs(mine.astype(int) - pillow)
        assert apart.max() <= 2 and (apart > 1).mean() < 0.01


def test_resize_weights_are_shares_and_zero_beyond_a_side():
    weights = resize_weights(torch.tensor([5, 9]), 9, 4)
    assert weights.shape == (2, 4, 9)
    assert torch.allclose(weights.sum(2), torch.ones(2, 4))
    assert (weights[0, :, 5:] == 0).all()


def test_moving_to_where_a_tensor_is_changes_nothing():
    tensor = torch.arange(3)
    assert to_device(tensor, CPU) is tensor


@pytest.mark.gpu
def test_an_epoch_of_batches_never_waits_for_the_gpu():
    device = torch.device("cuda")
    data = make_resident(noise(SIZES * 8), device)
    plan = BatchPlan(
        16, 32, HALF, device, AUGMENTATIONS["random_resized_crop_flip"], color_jitter=0.2, erasing=0.5,
        mixup=0.2, cutmix=1.0, classes=40,
    )  # fmt: skip
    epoch(data, plan)  # what is made once is made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch(data, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
