"""Schedules, optimizers, averaging, and the augmentations beyond the report's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from caltech_hpo.data.augment import (
    AUGMENTATIONS,
    beta,
    boxes,
    erase_some,
    grey,
    inside,
    jitter_each,
    mix,
)
from caltech_hpo.data.batches import HALF, BatchPlan, batch_sizes, training_batches
from caltech_hpo.data.cache import LabeledImages
from caltech_hpo.spec import Recipe
from caltech_hpo.training.average import WeightAverage
from caltech_hpo.training.models import build_model
from caltech_hpo.training.optimizers import make_optimizer, make_schedule

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def recipe(**changes) -> Recipe:
    values = {"architecture": "resnet18", "classes": 3, "data": "x", "learning_rate": 0.1, "epochs": 10}
    return Recipe.model_validate(values | changes)


@pytest.mark.parametrize("changes", [{"nesterov": True}, {"nesterov": False}, {"optimizer": "adamw"}])
def test_fused_steps_are_the_plain_ones(changes):
    """Convolutions lie in channels_last, and so do their gradients."""
    made = recipe(weight_decay=0.01, momentum=0.8, **changes)
    models = [build_model("resnet18", "none", 3, seed=0).to(memory_format=torch.channels_last) for _ in "ab"]
    untouched = build_model("resnet18", "none", 3, seed=0)
    fused, plain = (make_optimizer(model, made) for model in models)
    for group in plain.param_groups:
        assert group["fused"]
        group |= {"fused": False, "foreach": False}
    draw = generator()
    for _ in range(3):
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=draw)
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        fused.step()
        plain.step()
    for ours, theirs, before in zip(*(model.parameters() for model in (*models, untouched)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) and not torch.equal(ours, before)


def rates(made: Recipe, steps_an_epoch=5) -> list[float]:
    model = build_model("resnet18", "none", 3, seed=0)
    optimizer = make_optimizer(model, made)
    schedule = make_schedule(optimizer, made, steps_an_epoch)
    seen = []
    for _ in range(made.epochs * steps_an_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_step_schedule_falls_between_epochs():
    seen = rates(recipe(step_size=4, gamma=0.5))
    assert seen[:20] == [0.1] * 20 and seen[20:40] == pytest.approx([0.05] * 20)
    assert seen[40:] == pytest.approx([0.025] * 10)


def test_cosine_falls_to_nearly_nothing():
    seen = rates(recipe(schedule="cosine"))
    assert seen[0] == pytest.approx(0.1) and seen[25] == pytest.approx(0.05) and seen[-1] < 0.001
    assert all(after < before for before, after in itertools.pairwise(seen))


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_warmup_rises_to_the_learning_rate(schedule):
    seen = rates(recipe(schedule=schedule, warmup=0.2, step_size=100))
    assert seen[0] == pytest.approx(0.001)
    assert all(after > before for before, after in itertools.pairwise(seen[:11]))
    assert seen[10] == pytest.approx(0.1) and max(seen) == pytest.approx(0.1)


@pytest.mark.parametrize(("warmup", "top"), [(0.0, 0.3), (0.1, 0.1), (0.5, 0.5)])
def test_one_cycle_peaks_where_its_warmup_ends(warmup, top):
    seen = rates(recipe(schedule="one_cycle", warmup=warmup), steps_an_epoch=20)
    assert max(seen) == pytest.approx(0.1) and seen[0] < 0.005 and seen[-1] < 0.001
    assert np.argmax(seen) == pytest.approx(top * len(seen), abs=2)


def test_the_head_may_learn_faster():
    model = build_model("resnet18", "none", 3, seed=0)
    optimizer = make_optimizer(model, recipe(head_lr_factor=10.0))
    body, head = optimizer.param_groups
    assert (body["lr"], head["lr"]) == (0.1, pytest.approx(1.0))
    assert {id(p) for p in head["params"]} == {id(p) for p in model.fc.parameters()}
    assert len(body["params"]) + len(head["params"]) == len(list(model.parameters()))
    schedule = make_schedule(optimizer, recipe(head_lr_factor=10.0, schedule="one_cycle"), 5)
    assert schedule.get_last_lr()[1] == pytest.approx(10 * schedule.get_last_lr()[0])


def test_optimizers_are_torchs():
    model = nn.Sequential(nn.Linear(2, 2))
    sgd = make_optimizer(model, recipe(nesterov=True, weight_decay=0.01, momentum=0.8))
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["nesterov"], sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (
        True, 0.8, 0.01,
    )  # fmt: skip
    adamw = make_optimizer(model, recipe(optimizer="adamw", momentum=0.8, weight_decay=0.01))
    assert type(adamw) is torch.optim.AdamW and adamw.defaults["betas"] == (0.8, 0.999)


def test_the_average_follows_the_weights_and_swaps_with_them():
    module = nn.BatchNorm1d(2)
    average = WeightAverage(module, 0.9)
    values = []
    for step in range(30):
        with torch.no_grad():
            module.weight.fill_(float(step))
            module.running_mean.fill_(float(2 * step))
        average.update()
        values.append(float(step))
    expected = 1.0
    for step, value in enumerate(values):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    average.swap()
    assert module.weight.tolist() == pytest.approx([expected] * 2)
    assert 2 * 15 < float(module.running_mean[0]) < 2 * 29
    average.swap()
    assert module.weight.tolist() == [29.0, 29.0] and module.running_mean.tolist() == [58.0, 58.0]


def test_boxes_lie_in_their_images_and_cover_the_areas_asked_for():
    sizes = torch.tensor([[40, 90], [64, 64], [90, 40]]).repeat(2000, 1)
    box = boxes(sizes, (0.2, 0.5), (3 / 4, 4 / 3), generator())
    assert bool((box[:, :2] >= 0).all()) and bool((box[:, 2:] >= 1).all())
    assert bool((box[:, :2] + box[:, 2:] <= sizes).all())
    square = box[1::3]
    areas = (square[:, 2] * square[:, 3]) / 64**2
    assert 0.18 < float(areas.min()) < 0.22 and 0.48 < float(areas.max()) < 0.52
    assert float(areas.mean()) == pytest.approx(0.35, abs=0.01)
    ratios = square[:, 3] / square[:, 2]
    assert float(ratios.min()) > 0.7 and float(ratios.max()) < 1.45


def test_erasing_blanks_one_box_in_some_images():
    batch = torch.ones(400, 3, 32, 32)
    erased = erase_some(batch, 0.25, generator())
    touched = (erased == 0).flatten(1).any(1)
    assert 0.18 < float(touched.double().mean()) < 0.32
    shares = (erased[touched] == 0).double().mean((1, 2, 3))
    assert float(shares.min()) > 0.01 and float(shares.max()) < 0.36
    assert torch.equal(erased[~touched], batch[~touched])


def test_colour_jitter_draws_for_each_image_and_grey_stays_grey():
    batch = torch.full((50, 3, 4, 4), 100.0)
    batch[:, 0, :2] = 160.0
    jittered = jitter_each(batch, 0.4, generator())
    assert float(jittered.min()) >= 0 and float(jittered.max()) <= 255
    assert len({round(float(image.sum()), 2) for image in jittered}) == 50
    plain = torch.full((5, 3, 4, 4), 100.0)
    changed = jitter_each(plain, 0.4, generator())
    assert torch.allclose(changed, grey(changed).expand_as(changed), atol=1e-3)
    assert torch.allclose(jitter_each(batch, 0.0, generator()), batch, atol=1e-3)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_gives_labels_the_share_of_their_pixels(mixup, cutmix):
    """Every image is constant and equal to its label, so its mean tells what it was mixed of."""
    labels = torch.arange(200) % 10
    batch = labels.float()[:, None, None, None].expand(200, 3, 16, 16).clone()
    mixed, shares = mix(batch, labels, 10, mixup, cutmix, generator())
    assert shares.shape == (200, 10) and torch.allclose(shares.sum(1), torch.ones(200))
    expected = shares @ torch.arange(10.0)
    assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-4)
    blended = torch.tensor([len(image.unique()) for image in mixed]) == 1
    if not cutmix:
        assert bool(blended.all())
    if not mixup:  # pasted pixels are whole
        assert bool((mixed == mixed.round()).all())
    assert len({round(float(row.max()), 4) for row in shares}) > 20  # a draw for each image


def test_beta_draws_have_the_mean_and_spread_of_the_distribution():
    for alpha in (0.2, 1.0, 3.0):
        draws = beta(20_000, alpha, generator())
        assert float(draws.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(draws.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.005)
    assert beta(3, 0.0, generator()).tolist() == [1, 1, 1]


def test_inside_marks_the_boxes():
    mask = inside(torch.tensor([[1, 0, 2, 3], [0, 0, 0, 0]]), 4, 4)
    assert mask[0, 0].nonzero().tolist() == [[r, c] for r in (1, 2) for c in (0, 1, 2)]
    assert not mask[1].any()


def images_of(count: int) -> LabeledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 50, 3), dtype=np.uint8)
    return LabeledImages(list(pixels), np.arange(count))


def test_concat_shows_every_image_four_times():
    data = images_of(10)
    plan = BatchPlan(16, 32, HALF, CPU, AUGMENTATIONS["concat"])
    assert batch_sizes(10, plan) == [16, 16, 8]
    batches = list(training_batches(data, plan, generator(1), generator(2)))
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == sorted(list(range(10)) * 4)
    images = torch.cat([images for images, _ in batches])
    crops = torch.from_numpy(np.stack(data.images)[:, 4:36, 9:41]).permute(0, 3, 1, 2).float()
    centre = (crops / 127.5 - 1).round(decimals=4)
    for label in range(10):
        mine = images[labels == label].round(decimals=4)
        assert sum(torch.equal(image, centre[label]) for image in mine) == 1
        assert sum(torch.equal(image, centre[label].flip(2)) for image in mine) == 1


def test_resized_crops_show_small_parts_of_the_image():
    data = images_of(30)
    plan = BatchPlan(30, 32, HALF, CPU, AUGMENTATIONS["random_resized_crop"], smallest_area=0.1)
    images, _ = next(training_batches(data, plan, generator(1), generator(2)))
    assert images.shape == (30, 3, 32, 32)
    whole = BatchPlan(30, 32, HALF, CPU, AUGMENTATIONS["random_resized_crop"], smallest_area=1.0)
    larger, _ = next(training_batches(data, whole, generator(1), generator(2)))
    assert float(images.std()) != pytest.approx(float(larger.std()), rel=0.02)  # less is averaged away


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.2},
        {"cutmix": 1.0},
        {"erasing": 0.5},
        {"color_jitter": 0.3},
        {"mixup": 0.2, "erasing": 1.0},
    ],
)  # fmt: skip
def test_every_part_is_seeded_and_keeps_the_memory_format(changes):
    plan = BatchPlan(8, 32, HALF, CPU, AUGMENTATIONS["random_crop_flip"], classes=8, **changes)

    def draw(seed):
        return next(training_batches(images_of(8), plan, generator(1), generator(seed)))

    images, labels = draw(2)
    assert torch.equal(images, draw(2)[0]) and torch.equal(labels, draw(2)[1])
    assert not torch.equal(images, draw(3)[0])
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert math.isclose(float(labels.float().sum()), 8 if labels.ndim == 2 else 28, rel_tol=1e-5)


@pytest.mark.parametrize("epochs", range(1, 12))
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.2, 0.25, 0.5, 0.99])
def test_one_cycle_runs_however_short_it_is(epochs, warmup):
    seen = rates(recipe(schedule="one_cycle", warmup=warmup, epochs=epochs), steps_an_epoch=1)
    assert len(seen) == epochs and all(0 < rate <= 0.1 + 1e-9 for rate in seen)
    assert max(seen) > 0.04


def test_small_alphas_mix_little():
    """Beta(0.01, 0.01) lies between 0.1 and 0.9 in 2.2% of draws (its distribution function)."""
    draws = beta(50_000, 0.01, generator())
    assert float(((draws > 0.1) & (draws < 0.9)).double().mean()) == pytest.approx(0.022, abs=0.004)
    with pytest.raises(ValidationError, match=r"0 \(off\) or at least 0.01"):
        recipe(mixup=0.001)
