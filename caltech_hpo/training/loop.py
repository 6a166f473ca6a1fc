"""The training loop: `train` is a generator of epochs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caltech_hpo.spec import EpochResult, Recipe
from caltech_hpo.terms import Precision
from caltech_hpo.training.average import WeightAverage
from caltech_hpo.training.device import autocast, resolve_precision
from caltech_hpo.training.freezing import training_mode
from caltech_hpo.training.optimizers import make_optimizer, make_schedule
from caltech_hpo.training.prepare import Prepared, derive_seed
from caltech_hpo.training.sources import Source


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split. `predictions` and `labels` are (n,) int64 on the CPU.

    `top1_flip` is the accuracy of the probabilities' mean over each image and its mirror image, None
    unless asked for.
    """

    loss: float
    top1: float
    predictions: Tensor
    labels: Tensor
    top1_flip: float | None = None


def train(recipe: Recipe, prepared: Prepared) -> Iterator[EpochResult]:
    """Trains the prepared model in place and yields after every epoch.

    Between epochs the model holds what was evaluated (averaged weights, with `ema`): it may be saved or
    left. Without a validation source there are no validation scores. The random draws of an epoch
    depend on the recipe's seed and the epoch alone.
    """
    model, training, validation = prepared.runs, prepared.training, prepared.validation
    device = prepared.device
    precision = resolve_precision(recipe.precision, device)
    optimizer = make_optimizer(prepared.model, recipe)
    schedule = make_schedule(optimizer, recipe, len(training.sizes))
    average = WeightAverage(model, recipe.ema) if recipe.ema else None
    step = Step(
        optimizer, schedule, average, device, precision, recipe.label_smoothing, prepared.prefix,
        prepared.micro_batch,
    )  # fmt: skip
    for epoch in range(1, recipe.epochs + 1):
        start = time.perf_counter()
        learning_rate = float(schedule.get_last_lr()[0])
        batches = training.training(
            order=_generator(recipe.seed, "order", epoch),
            draws=_generator(recipe.seed, "augmentation", epoch),
        )
        torch.manual_seed(derive_seed(recipe.seed, "dropout", epoch))  # dropout takes no generator
        training_loss = train_epoch(model, batches, step)
        if average:
            average.swap()
        flip = recipe.test_time_flip
        scores = evaluate(model, validation, device, precision, flip=flip) if validation else None
        yield EpochResult(
            epoch=epoch,
            learning_rate=learning_rate,
            training_loss=training_loss,
            validation_loss=scores.loss if scores else None,
            validation_top1=scores.top1 if scores else None,
            validation_top1_flip=scores.top1_flip if scores else None,
            images=sum(training.sizes),
            seconds=time.perf_counter() - start,
            micro_batch=prepared.micro_batch,
        )
        if average:
            average.swap()


def _generator(seed: int, *purpose: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@dataclass(frozen=True)
class Step:
    """What a gradient step needs besides the batch; `micro_batch` are computed at a time (None: all)."""

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: WeightAverage | None
    device: torch.device
    precision: Precision
    label_smoothing: float = 0.0
    prefix: nn.Module | None = None
    micro_batch: int | None = None


def train_epoch(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], step: Step) -> float:
    """One pass of gradient steps; returns the mean loss over the images."""
    training_mode(model, step.prefix)
    device = step.device
    total = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32)
    images = 0
    for inputs, labels in batches:
        step.optimizer.zero_grad(set_to_none=True)
        loss = gradients(model, inputs, labels, step)
        step.optimizer.step()
        step.schedule.step()
        if step.average:
            step.average.update()
        total += loss * len(labels)  # summed on the device: reading it would wait for the GPU
        images += len(labels)
    return float(total) / images


def gradients(model: nn.Module, inputs: Tensor, labels: Tensor, step: Step) -> Tensor:
    """Adds the batch's gradients to the parameters'; returns its mean loss, 0-dimensional.

    With a micro-batch the images go in pieces of nearly equal size; each piece's mean loss counts by its
    share of the batch, so that the sum is the batch's gradient (batch norm alone sees the piece).
    """
    pieces = 1 if step.micro_batch is None else -(-len(labels) // step.micro_batch)
    losses = []
    for some, truth in zip(inputs.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
        with autocast(step.device, step.precision):
            loss = nn.functional.cross_entropy(model(some), truth, label_smoothing=step.label_smoothing)
            loss = loss * (len(truth) / len(labels)) if pieces > 1 else loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return losses[0] if pieces == 1 else torch.stack(losses).sum()


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: Source, device: torch.device, precision: Precision, *, flip: bool = False
) -> Evaluation:
    """Mean cross entropy and top-1 accuracy over all images, centre crops, evaluation mode.

    `flip` scores a second time, over each image and its mirror image.
    """
    model.eval()
    precision = resolve_precision(precision, device)
    logits, labels = _logits(model, data.evaluation(), device, precision)
    top1_flip = None
    if flip:
        mirrored, _ = _logits(model, data.evaluation(flipped=True), device, precision)
        both = logits.softmax(1) + mirrored.softmax(1)
        top1_flip = float((both.argmax(1) == labels).double().mean())
    loss = float(nn.functional.cross_entropy(logits, labels))
    predicted = logits.argmax(1)
    return Evaluation(loss, float((predicted == labels).double().mean()), predicted, labels, top1_flip)


def _logits(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, precision: Precision
) -> tuple[Tensor, Tensor]:
    """(n, classes) float32 and (n,) int64, both on the CPU."""
    logits, labels = [], []
    for inputs, truth in batches:
        with autocast(device, precision):
            logits.append(model(inputs).float())
        labels.append(truth)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()
