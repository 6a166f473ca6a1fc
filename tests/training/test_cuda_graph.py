"""A GPU's steps are recorded once and replayed: the same numbers, the learning rate of every step its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import write_folders

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.spec import Recipe
from caltech_hpo.training.cuda_graph import PLAIN_STEPS, _nothing_tried, _rates_from
from caltech_hpo.training.features import Split
from caltech_hpo.training.loop import step_graph, train, train_batches
from caltech_hpo.training.memory import MicroBatches, _kind, with_micro_batch
from caltech_hpo.training.prepare import prepare
from caltech_hpo.training.state import begin, begin_epoch
from caltech_hpo.training.system_memory import memory_share

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIXED = {"mixup": 0.2, "cutmix": 1.0, "augmentation": "random_resized_crop_flip", "color_jitter": 0.2}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    search = load_search_data(scan(write_folders(folder / "images", images=18)), 72, folder / "cache")
    return Split(((search.open_training(), "a"),)), Split(((search.open_validation(), "b"),))


def recipe(**changes) -> Recipe:
    """AlexNet without batch norm: its loss tells rates and dropout apart, and not how sums are rounded."""
    values = {
        "architecture": "alexnet", "init": "kaiming", "resize": 72, "crop": 64, "batch_size": 4,
        "learning_rate": 0.002, "epochs": 2, "schedule": "one_cycle", "precision": "fp32", "classes": 3,
        "data": "x", "augmentation": "random_crop_flip", "dropout": 0.5, "nesterov": True,
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


def on_gpu(made, splits):
    *_, prepared = prepare(made, *splits, GPU)
    prepared = MicroBatches(GPU, memory_share(GPU, None, 1)).fit(made, prepared)
    assert prepared.replays
    return prepared


def losses(made, splits, *, graphed: bool) -> list[float]:
    """Of each epoch."""
    prepared = on_gpu(made, splits)
    state = begin(made, prepared)
    graph = step_graph(made, prepared, state) if graphed else None
    found = []
    for epoch in range(1, made.epochs + 1):
        begin_epoch(state, made, epoch)
        train_batches(made, prepared, state, prepared.training.training(state.order, state.draws), graph)
        found.append(float(state.loss))
    assert graph is None or graph.recorded
    assert len(prepared.training.sizes) > PLAIN_STEPS + 1 and prepared.training.sizes[-1] != made.batch_size
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"optimizer": "adamw", "nesterov": False, "learning_rate": 1e-4}, {"precision": "bf16"},
        {"ema": 0.9, "head_lr_factor": 3.0, "schedule": "cosine", **MIXED},
        {"ema": 0.9, "precision": "bf16", "momentum": 0.0, "nesterov": False},
    ],
    ids=["sgd", "adamw", "bf16", "mixed", "averaged"],
)  # fmt: skip
def test_a_replayed_training_is_the_plain_one(splits, changes):
    made = recipe(**changes)
    plain, replayed = (losses(made, splits, graphed=graphed) for graphed in (False, True))
    assert replayed == pytest.approx(plain, rel=3e-2)


@pytest.mark.gpu
def test_batch_norms_count_replayed_steps(splits):
    made = recipe(architecture="resnet18", epochs=1)
    prepared = on_gpu(made, splits)
    (epoch,) = train(made, prepared)
    assert prepared.model.bn1.num_batches_tracked == len(prepared.training.sizes)
    assert 0 < epoch.training_loss < 5


@pytest.mark.gpu
def test_without_memory_for_the_recording_it_goes_on_as_it_was(splits, monkeypatch):
    made = recipe()
    prepared = on_gpu(made, splits)

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", full)
    assert len(list(train(made, prepared))) == 2


def test_steps_are_recorded_where_there_is_room_and_the_model_is_known(splits, monkeypatch):
    """Three times a step's memory: the graph's, that of plain steps, and scoring's."""
    made = recipe()
    *_, prepared = prepare(made, *splits, CPU)
    state = begin(made, prepared)
    assert not prepared.replays and step_graph(made, prepared, state) is None
    for limit, replays in ((3 << 20, True), ((3 << 20) - 1, False)):
        memory = MicroBatches(GPU, limit)

        def step(recipe, prepared, images, memory=memory):
            memory._image_bytes[_kind(recipe, prepared)] = (1 << 20) / images

        monkeypatch.setattr(memory, "_train_once", step)
        fitted = memory.fit(made, prepared)
        assert fitted.replays == replays and (step_graph(made, fitted, state) is not None) == replays
    room = replace(prepared, replays=True)
    assert step_graph(recipe(architecture="timm/convnext_atto"), room, state) is None
    assert not with_micro_batch(room, made, 2).replays


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_while_recording_the_rates_are_tensors(kind):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = kind([{"params": [p], "lr": rate} for p, rate in zip(parameters, (0.1, 0.2), strict=True)])
    before = [dict(group) for group in optimizer.param_groups]
    rates = [torch.tensor(0.3), torch.tensor(0.4)]
    with _rates_from(optimizer, rates):
        assert [group["lr"] for group in optimizer.param_groups] == rates
        assert all(group.get("capturable", True) for group in optimizer.param_groups)
    assert [dict(group) for group in optimizer.param_groups] == before


def test_while_recording_cudnn_tries_nothing(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with _nothing_tried():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
