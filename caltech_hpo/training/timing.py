"""Times a few steps of a training, so that its whole can be foretold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from caltech_hpo.spec import Recipe
from caltech_hpo.timings import StepTime, kind_of, views_of
from caltech_hpo.training.cuda_graph import PLAIN_STEPS
from caltech_hpo.training.device import autocast, resolve_precision, synchronize, try_algorithms
from caltech_hpo.training.features import CHUNK, MOST_BYTES, Split, feature_bytes
from caltech_hpo.training.loop import step_graph, train_batches
from caltech_hpo.training.memory import MicroBatches
from caltech_hpo.training.memory_estimate import model_bytes, needed_bytes
from caltech_hpo.training.prepare import Prepared, frozen_parts, prepare
from caltech_hpo.training.sources import FeatureSource, plan_for
from caltech_hpo.training.state import begin, checkpoint_bytes

STEPS = 2  # timed ones on a GPU, after those that warm up
# Elsewhere at least and at most so many, until these seconds of training or scoring have passed. The first
# ones make the memory that the others find: AlexNet's took 1.20, 0.57, 0.54, 0.37, 0.36, 0.36 s.
LEAST, MOST, TRAINING, SCORING = 4, 12, 3.0, 1.0
LONG = 8.0  # seconds after which two steps are enough; ResNet-18's first one was twice as long as the others


def time_steps(
    recipe: Recipe, training: Split, validation: Split, device: torch.device, memory: MicroBatches, *,
    features: bool,
) -> StepTime:  # fmt: skip
    """Prepares the recipe and times a few of its steps on real images; nothing is kept.

    `features` says whether a worker keeps a frozen prefix's outputs. Raises torch.OutOfMemoryError.
    """
    started = time.perf_counter()
    recipe = recipe.model_copy(update={"schedule": "step"})  # the others count their steps
    *_, prepared = prepare(recipe, training, validation, device)
    assert isinstance(prepared, Prepared), "prepare ends with it"
    once, kept = 0.0, 0
    parts = frozen_parts(prepared.model, recipe) if features and views_of(recipe) else None
    if parts is not None:
        plan = plan_for(recipe, device)
        precision = resolve_precision(recipe.precision, device)
        kept = feature_bytes(parts[0], plan, precision)
        if kept > MOST_BYTES:
            parts, kept = None, 0
    setup = time.perf_counter() - started
    if parts is not None:
        prefix, rest = parts
        inputs, labels = next(prepared.training.in_batches_of(CHUNK).evaluation())
        once, outputs = _timed_outputs(prefix, inputs, recipe, device)
        repeated = torch.arange(recipe.batch_size, device=device) % len(outputs)
        outputs = outputs[repeated]
        source = FeatureSource((outputs, outputs), labels[repeated], plan_for(recipe, device))
        prepared = replace(prepared, runs=rest, training=source, validation=source, prefix=None)
    prepared = memory.fit(recipe, prepared)  # once for each kind and worker: no trial's own
    (batch, spread), checkpoint = _training_time(recipe, prepared)
    evaluation = _evaluation_time(recipe, prepared)
    return StepTime(
        kind=kind_of(recipe), setup=setup, batch=batch, spread=spread, evaluation=evaluation, once=once,
        kept=kept, weights=model_bytes(prepared.model), checkpoint=checkpoint,
        micro_batch=prepared.micro_batch,
        memory=needed_bytes(recipe, prepared)(prepared.micro_batch or recipe.batch_size),
    )  # fmt: skip


def _training_time(recipe: Recipe, prepared: Prepared) -> tuple[tuple[float, float], int]:
    """Of a training batch, its making included, what `_steady` says; bytes of a checkpoint after it."""
    state = begin(recipe, prepared)
    graph = step_graph(recipe, prepared, state)
    batches = _endless(prepared)
    warming = 1
    if graph is not None and recipe.batch_size in prepared.training.sizes:
        warming = PLAIN_STEPS + 1  # whole batches alone, the last of which is recorded
        batches = (batch for batch in batches if len(batch[1]) == recipe.batch_size)

    def step() -> None:
        train_batches(recipe, prepared, state, [next(batches)], graph)
        float(state.loss)  # waits for a GPU

    return _steady(step, prepared.device, warming, TRAINING), checkpoint_bytes(state, prepared)


def _steady(
    step: Callable[[], None], device: torch.device, warming: int, enough: float
) -> tuple[float, float]:  # fmt: skip
    """Seconds of a step, once those that warm up are over, and how many times the shortest one's they are."""
    found: list[float] = []
    while not _suffices(found, device, warming, enough):
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    if device.type == "cuda":
        return statistics.fmean(found[warming:] or found[-1:]), 1.0
    steady = found[len(found) // 2 :]  # the first ones made memory
    seconds = statistics.median_low(steady)  # one or another waited for another program
    return seconds, seconds / min(steady)


def _suffices(found: list[float], device: torch.device, warming: int, enough: float) -> bool:
    """Whether no further step need be timed. A GPU's first one says nothing: it loads and compiles."""
    if len(found) >= 2 and sum(found[device.type == "cuda" :]) >= LONG:
        return True
    if device.type == "cuda":
        return len(found) == warming + STEPS
    return len(found) == MOST or (len(found) >= LEAST and sum(found) >= enough)


@torch.inference_mode()
def _evaluation_time(recipe: Recipe, prepared: Prepared) -> float:
    """Seconds of a validation image."""
    assert prepared.validation is not None, "a study is scored on its validation images"
    prepared.runs.eval()
    views = 2 if recipe.test_time_flip else 1
    precision = resolve_precision(recipe.precision, prepared.device)
    validation, images = prepared.validation, 0

    def step() -> None:
        nonlocal images
        inputs, labels = next(validation.evaluation())
        with autocast(prepared.device, precision):
            prepared.runs(inputs)
        synchronize(prepared.device)
        images = len(labels)

    seconds, _ = _steady(step, prepared.device, 1, SCORING)
    return views * seconds / images


def _timed_outputs(
    prefix: torch.nn.Module, inputs: Tensor, recipe: Recipe, device: torch.device
) -> tuple[float, Tensor]:
    """Seconds an image that a frozen prefix takes, and its outputs."""
    prefix.eval()
    try_algorithms(wanted=True)
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        with torch.inference_mode(), autocast(device, resolve_precision(recipe.precision, device)):
            outputs = prefix(inputs)
        synchronize(device)
        seconds = time.perf_counter() - started
    # copied outside of inference mode, whose tensors cannot be trained on
    return seconds / len(inputs), torch.empty_like(outputs).copy_(outputs)


def _endless(prepared: Prepared) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from prepared.training.training(torch.Generator(), torch.Generator())
