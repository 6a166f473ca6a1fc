"""How fast a machine trains: the stock way, ours, and the floor, which is the same step on one batch.

Stock is what a torchvision tutorial does: a data set of JPEG files, transforms in a DataLoader of four
workers that are started anew for every epoch, float32, NCHW, no compilation.
"""

from __future__ import annotations

import itertools
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from caltech_hpo.data.augment import AUGMENTATIONS
from caltech_hpo.data.loading import SearchData
from caltech_hpo.spec import Recipe
from caltech_hpo.training.architectures import normalization_for
from caltech_hpo.training.batch_timing import FEWEST_BATCHES, Batch, Limited, Timing, timed
from caltech_hpo.training.device import (
    autocast,
    keep_near,
    resolve_device,
    resolve_precision,
    try_algorithms,
)
from caltech_hpo.training.features import Split
from caltech_hpo.training.loop import step_graph, train_batches
from caltech_hpo.training.memory import MicroBatches
from caltech_hpo.training.models import untrained
from caltech_hpo.training.prepare import Prepared, prepare
from caltech_hpo.training.state import begin
from caltech_hpo.training.system_memory import is_out_of_memory, keep_freed_memory, memory_share

LOADER_WORKERS = 4
LOADER_ROUNDS = 4  # that a measurement on a GPU takes at most, a batch for each worker in one

Way = Literal["stock", "ours"]
Phase = Literal["train", "eval", "floor train", "floor eval"]


@dataclass(frozen=True)
class BenchTask:
    """What is measured: a recipe on decoded images (ours) and on the files they came from (stock).

    `training` and `validation` are (file, label) each.
    """

    recipe: Recipe
    device: str
    data: SearchData
    training: tuple[tuple[Path, int], ...]
    validation: tuple[tuple[Path, int], ...]


class StockImages(Dataset[Any]):
    """JPEG files, decoded and transformed when they are asked for."""

    def __init__(self, files: tuple[tuple[Path, int], ...], transform: Callable[[Any], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.datasets.folder import default_loader

        path, label = self.files[index]
        return self.transform(default_loader(str(path))), label


def stock_transform(recipe: Recipe, *, training: bool) -> Callable[[Any], Tensor]:
    """The report's preprocessing, and the recipe's augmentation, in torchvision's transforms."""
    from torchvision import transforms

    augmentation = AUGMENTATIONS[recipe.augmentation]
    normalization = normalization_for(recipe.architecture, recipe.weights)
    crop = transforms.RandomCrop if training and augmentation.random_crop else transforms.CenterCrop
    steps: list[Any] = [transforms.Resize(recipe.resize), crop(recipe.crop)]
    if training and augmentation.resized:
        steps = [transforms.RandomResizedCrop(recipe.crop, (recipe.smallest_area, 1.0))]
    if training and augmentation.flip:
        steps.append(transforms.RandomHorizontalFlip(augmentation.flip))
    if training and augmentation.rotation:
        steps.append(transforms.RandomRotation(augmentation.rotation))
    steps += [transforms.ToTensor(), transforms.Normalize(normalization.mean, normalization.std)]
    composed: Callable[[Any], Tensor] = transforms.Compose(steps)
    return composed


class Stock:
    """The stock way."""

    def __init__(self, task: BenchTask) -> None:
        self._task, self._device = task, resolve_device(task.device)
        recipe = task.recipe
        self._model = untrained(recipe.architecture, recipe.classes).to(self._device)
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
        )
        self._batch_seconds: dict[Phase, float] = {}  # of the latest measurement: what fits into the next

    def measure(self, phase: Phase, seconds: float) -> Timing:
        """A whole epoch over as many images as fit into `seconds`, and at least a few batches.

        On a GPU it is the workers that a step waits for, and they decode a batch each at a time: there it is
        an epoch of whole rounds of them, of which every one takes the same time.
        """
        training = phase == "train"
        recipe = self._task.recipe
        files = self._task.training if training else self._task.validation
        self._warm_up(training=training)
        on_gpu = self._device.type == "cuda"
        fitting = int(seconds / self._batch_seconds[phase]) if phase in self._batch_seconds else 0
        batches = LOADER_ROUNDS * LOADER_WORKERS if on_gpu else max(FEWEST_BATCHES, fitting)
        count = batches * recipe.batch_size
        loader = DataLoader(
            StockImages(files[:count], stock_transform(recipe, training=training)), recipe.batch_size,
            shuffle=training, num_workers=LOADER_WORKERS, pin_memory=on_gpu,
            # What a script gets, Linux forks: in this process, which was spawned, the default is to spawn.
            multiprocessing_context=multiprocessing.get_all_start_methods()[0],
        )  # fmt: skip
        self._model.train(training)
        with torch.set_grad_enabled(training):
            timing = timed(iter(loader), self._train if training else self._evaluate, self._device)
        whole = timing.start + timing.seconds
        self._batch_seconds[phase] = whole * recipe.batch_size / timing.images
        return replace(timing, seconds=whole, start=0.0) if on_gpu else timing

    def _warm_up(self, *, training: bool) -> None:
        """A step that is not timed: a process that was idle is slow at first."""
        recipe = self._task.recipe
        batch = torch.zeros(recipe.batch_size, 3, recipe.crop, recipe.crop)
        self._model.train(training)
        with torch.set_grad_enabled(training):
            (self._train if training else self._evaluate)(
                batch, torch.zeros(recipe.batch_size, dtype=torch.int64)
            )

    def _train(self, inputs: Tensor, labels: Tensor) -> None:
        inputs, labels = (tensor.to(self._device, non_blocking=True) for tensor in (inputs, labels))
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _evaluate(self, inputs: Tensor, labels: Tensor) -> None:
        self._model(inputs.to(self._device, non_blocking=True))


class Ours:
    """Our way, and the floor."""

    def __init__(self, task: BenchTask) -> None:
        recipe, self._device = task.recipe, resolve_device(task.device)
        keep_freed_memory(self._device)
        splits = keep_near(self._device, task.data.open_training(), task.data.open_validation())
        training, validation = (Split(((split, name),)) for split, name in zip(splits, "ab", strict=True))
        *_, prepared = prepare(recipe, training, validation, self._device)
        assert isinstance(prepared, Prepared)
        memory = MicroBatches(self._device, memory_share(self._device, None, 1))
        self._prepared = memory.fit(recipe, prepared)
        self._recipe = recipe
        self._state = begin(recipe, self._prepared)
        self._graph = step_graph(recipe, self._prepared, self._state)
        self._one = {True: next(self._epoch(training=True)), False: next(self._epoch(training=False))}
        if self._device.type == "cuda":  # every shape once: the first meeting takes seconds
            for way in (True, False):
                self._steps(way, self._epoch(training=way))
            self._make_room()

    def _epoch(self, *, training: bool) -> Iterator[Batch]:
        assert self._prepared.validation is not None, "the bench has both splits"
        if training:
            return self._prepared.training.training(torch.Generator(), torch.Generator())
        return self._prepared.validation.evaluation()

    def measure(self, phase: Phase, seconds: float) -> Timing:
        """Epochs one after another until `seconds` have passed, and a few batches at least.

        A step before them is not timed: a process that was idle is slow at first.
        """
        training = phase.endswith("train")
        one = self._one[training]
        batches = itertools.repeat(one) if phase.startswith("floor") else self._repeated(training)
        self._steps(training, [one])
        limited = Limited(batches, seconds, self._device)
        self._steps(training, limited)
        self._make_room()
        return limited.timing()

    def _make_room(self) -> None:
        """For stock, which shares the GPU: what was only tried is given back."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _steps(self, training: bool, batches: Iterable[Batch]) -> None:
        if training:
            train_batches(self._recipe, self._prepared, self._state, batches, self._graph)
        else:
            self._evaluate(batches)

    def _repeated(self, training: bool) -> Iterator[Batch]:
        while True:
            yield from self._epoch(training=training)

    @torch.inference_mode()
    def _evaluate(self, batches: Iterable[Batch]) -> None:
        self._prepared.runs.eval()
        for inputs, labels in batches:
            try_algorithms(wanted=len(labels) == len(self._one[False][1]))
            with autocast(self._device, resolve_precision(self._recipe.precision, self._device)):
                self._prepared.runs(inputs)


def bench_worker(connection: Connection) -> None:
    """A process that measures one way: is sent a BenchTask and the way, says None when it is ready, then a
    Timing for each phase asked. A string takes a Timing's place where the memory does not suffice.
    """
    task: BenchTask
    way: Way
    task, way = connection.recv()
    # four workers are what is measured, also where a loader advises fewer
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    runner: Stock | Ours | None = None
    try:
        runner = Stock(task) if way == "stock" else Ours(task)
        connection.send(None)
        while (asked := connection.recv()) is not None:
            connection.send(runner.measure(*asked))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        connection.send(f"out of memory: {str(error).splitlines()[0]}")
