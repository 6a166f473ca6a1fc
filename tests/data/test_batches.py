"""Batches: the reference transform without augmentation, an own draw per image with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from caltech_hpo.data.augment import AUGMENTATIONS, crop_corners, rotate_each
from caltech_hpo.data.batches import HALF, IMAGENET, BatchPlan, cropped, evaluation_batches, training_batches
from caltech_hpo.data.cache import LabeledImages
from caltech_hpo.data.dataset import scan
from caltech_hpo.data.decode import decode_image
from caltech_hpo.terms import AugmentationName

CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(count: int, size=(40, 56)) -> LabeledImages:
    """Images whose pixels tell where they come from: red = number, green = row, blue = column."""
    made = []
    for number in range(count):
        image = np.zeros((*size, 3), dtype=np.uint8)
        image[..., 0] = number % 256
        image[..., 1] = np.arange(size[0])[:, None]
        image[..., 2] = np.arange(size[1])[None, :]
        made.append(image)
    return LabeledImages(made, np.arange(count, dtype=np.int64))


def bytes_of(batch: torch.Tensor) -> torch.Tensor:
    """Undoes the scaling to [-1, 1]."""
    return (batch + 1) * 127.5


@pytest.mark.parametrize("normalization", [HALF, IMAGENET], ids=["half", "imagenet"])
def test_centre_crops_equal_torchvisions_reference(caltech101, normalization):
    from torchvision import transforms

    reference = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(normalization.mean, normalization.std),
        ]
    )
    index = scan(caltech101)
    # Every 58th image, and the greyscale and long ones among the first thousand.
    chosen = list(index.training[::58])[:50]
    grey, long = [], []
    for sample in [*index.training, *index.validation]:
        with Image.open(index.root / sample.path) as image:
            if image.mode == "L" and len(grey) < 75:
                grey.append(sample)
            elif max(image.size) > 2 * min(image.size) and len(long) < 75:
                long.append(sample)
    chosen += grey + long
    assert len(chosen) == 200
    paths = [index.root / sample.path for sample in chosen]
    data = LabeledImages([decode_image(path, 256) for path in paths], np.zeros(200, dtype=np.int64))
    plan = BatchPlan(64, 224, normalization, CPU)
    ours = torch.cat([images for images, _ in evaluation_batches(data, plan)])
    std = torch.tensor(normalization.std).view(3, 1, 1)
    for path, tensor in zip(paths, ours, strict=True):
        with Image.open(path) as image:
            expected = reference(image.convert("RGB"))
        assert float(((tensor - expected) * std).abs().mean()) < 1 / 255, path


def test_batches_are_float_channels_last_and_complete():
    data = images_of(10)
    batches = list(evaluation_batches(data, BatchPlan(4, 32, HALF, CPU)))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    images, labels = batches[0]
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    corner = bytes_of(images)[1, :, 0, 0].round().tolist()
    assert corner == [1, 4, 12]  # image 1, row (40-32)/2, column (56-32)/2


def test_an_epoch_sees_every_image_once_in_a_seeded_order():
    data, plan = images_of(11), BatchPlan(4, 32, HALF, CPU)

    def epoch(seed):
        batches = training_batches(data, plan, generator(seed), generator(0))
        return torch.cat([labels for _, labels in batches]).tolist()

    assert sorted(epoch(1)) == list(range(11))
    assert epoch(1) == epoch(1) != epoch(2)


def test_a_last_batch_of_one_image_is_left_out():
    data, plan = images_of(9), BatchPlan(4, 32, HALF, CPU)
    sizes = [len(y) for _, y in training_batches(data, plan, generator(1), generator(0))]
    assert sizes == [4, 4]


def test_random_crops_differ_and_reach_every_place():
    data = images_of(400, size=(34, 40))
    plan = BatchPlan(400, 32, HALF, CPU, AUGMENTATIONS["random_crop"])
    images, labels = next(training_batches(data, plan, generator(1), generator(2)))
    top = bytes_of(images)[:, 1, 0, 0].round().int().tolist()
    left = bytes_of(images)[:, 2, 0, 0].round().int().tolist()
    assert set(top) == {0, 1, 2} and set(left) == set(range(9))
    assert torch.equal(bytes_of(images)[:, 0, 5, 5].round().long() % 256, labels % 256)  # labels stay theirs


def test_the_centre_is_torchvisions():
    from torchvision.transforms.v2.functional import center_crop

    for size in [(32, 33), (35, 38), (37, 41), (32, 32)]:
        image = images_of(1, size).images[0]
        expected = center_crop(Image.fromarray(image), [32, 32])
        (top, left), *_ = crop_corners(
            torch.tensor([size]), 32, random=False, generator=generator(0)
        ).tolist()
        assert np.array_equal(image[top : top + 32, left : left + 32], np.asarray(expected))


@pytest.mark.parametrize("name", ["center_crop_flip", "random_crop_flip", "random_resized_crop_flip"])
def test_flips_are_drawn_for_each_image(name):
    """Each is its unmirrored crop, or that turned left to right; about half of 200 are."""
    data, chosen = images_of(200), torch.arange(200)
    plan = BatchPlan(200, 32, HALF, CPU)
    flipping = AUGMENTATIONS[name]
    found = cropped(data, chosen, plan, flipping, generator(3))
    plain = cropped(data, chosen, plan, replace(flipping, flip=0.0), generator(3))
    as_it_was = (found == plain).flatten(1).all(1)
    assert torch.equal(found[~as_it_was], plain[~as_it_was].flip(2))
    assert 0.35 < float(as_it_was.double().mean()) < 0.65


def test_rotation_turns_each_image_by_its_own_angle():
    batch = torch.zeros(64, 3, 33, 33)
    batch[:, :, 4, 16] = 255.0  # a dot above the middle
    turned = rotate_each(batch, 180.0, generator(1))
    places = {tuple(divmod(int(image[0].argmax()), 33)) for image in turned}
    assert len(places) > 30
    assert all(9 < np.hypot(row - 16, column - 16) < 14 for row, column in places)
    still = rotate_each(batch, 0.0, generator(1))
    assert torch.allclose(still, batch, atol=1e-3)


@pytest.mark.parametrize("name", AugmentationName.__args__)
def test_every_augmentation_is_seeded_and_in_range(name):
    data, plan = images_of(6), BatchPlan(6, 32, HALF, CPU, AUGMENTATIONS[name])

    def draw(seed):
        return torch.cat(
            [images for images, _ in training_batches(data, plan, generator(0), generator(seed))]
        )

    assert torch.equal(draw(1), draw(1))
    assert name == "center_crop" or not torch.equal(draw(1), draw(2))
    assert float(draw(1).min()) >= -1 and float(draw(1).max()) <= 1.0001


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu():
    data, gpu = images_of(6), torch.device("cuda", 0)
    for augmentation in AUGMENTATIONS.values():
        here, there = (
            next(training_batches(data, BatchPlan(6, 32, HALF, d, augmentation), generator(0), generator(1)))[
                0
            ]
            for d in (CPU, gpu)
        )
        assert torch.allclose(here, there.cpu(), atol=1e-2)
