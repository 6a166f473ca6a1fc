"""The training loop: `train` is a generator of epochs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from caltech_hpo.spec import EpochResult, Recipe
from caltech_hpo.terms import TIMM, Precision
from caltech_hpo.training.convolutions import fuse_again
from caltech_hpo.training.cuda_graph import StepGraph
from caltech_hpo.training.device import autocast, resolve_precision, try_algorithms
from caltech_hpo.training.freezing import training_mode
from caltech_hpo.training.prepare import Prepared
from caltech_hpo.training.sources import Source
from caltech_hpo.training.state import TrainingState, begin, begin_epoch

Batch = tuple[Tensor, Tensor]


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


class Interrupted(Exception):
    """Somebody asked a training to pause."""


def never() -> bool:
    """The training is not asked to pause."""
    return False


def train(
    recipe: Recipe, prepared: Prepared, state: TrainingState | None = None, *,
    interrupted: Callable[[], bool] = never,
) -> Iterator[EpochResult]:  # fmt: skip
    """Trains the prepared model in place and yields after every epoch; goes on from `state` where given.

    Between epochs the model holds what was evaluated (averaged weights, with `ema`): it may be saved or
    left. Without a validation source there are no validation scores. The random draws of an epoch
    depend on the recipe's seed and the epoch alone. `interrupted` is asked after every batch: once it says
    True the generator ends, and `state` holds where, batches of an unfinished epoch included.
    """
    state = state or begin(recipe, prepared)
    graph = step_graph(recipe, prepared, state)
    while state.epoch <= recipe.epochs:
        started = time.perf_counter()
        batches = prepared.training.training(state.order, state.draws, start=state.batch)
        try:
            train_batches(recipe, prepared, state, watched(batches, interrupted), graph)
            if state.average:
                state.average.swap()
            scores = _validate(recipe, prepared, interrupted)
        except Interrupted:
            if state.average and state.average.swapped:
                state.average.swap()
            state.seconds += time.perf_counter() - started
            return
        result = EpochResult(
            epoch=state.epoch,
            learning_rate=state.learning_rate,
            training_loss=float(state.loss) / state.images,
            validation_loss=scores.loss if scores else None,
            validation_top1=scores.top1 if scores else None,
            validation_top1_flip=scores.top1_flip if scores else None,
            images=state.images,
            seconds=state.seconds + time.perf_counter() - started,
            micro_batch=prepared.micro_batch,
        )
        state.results.append(result)
        begin_epoch(state, recipe, state.epoch + 1)
        yield result
        if state.average:
            state.average.swap()


def watched(batches: Iterator[Batch], interrupted: Callable[[], bool]) -> Iterator[Batch]:
    """The batches; raises Interrupted in place of the next one."""
    while not interrupted():
        batch = next(batches, None)
        if batch is None:
            return
        yield batch
    raise Interrupted


def _validate(recipe: Recipe, prepared: Prepared, interrupted: Callable[[], bool]) -> Evaluation | None:
    if prepared.validation is None:
        return None
    return evaluate(
        prepared.runs, prepared.validation, prepared.device, recipe.precision,
        flip=recipe.test_time_flip, interrupted=interrupted,
    )  # fmt: skip


def step_graph(recipe: Recipe, prepared: Prepared, state: TrainingState) -> StepGraph | None:
    """What replays the training's full batches on a GPU, to be handed to `train_batches`.

    None where `MicroBatches` has found no room for it, and for models named timm/..., which may do what
    cannot be recorded. It refers to the state: keep it no longer than that.
    """
    if not prepared.replays or recipe.architecture.startswith(TIMM):
        return None
    step = partial(_step, recipe, prepared, state)
    return StepGraph(step, state.optimizer, partial(fuse_again, prepared.runs))


def train_batches(
    recipe: Recipe, prepared: Prepared, state: TrainingState, batches: Iterable[Batch],
    graph: StepGraph | None = None,
) -> None:  # fmt: skip
    """Gradient steps on the batches; the state counts them and sums the loss over their images."""
    training_mode(prepared.runs, prepared.prefix)
    for inputs, labels in batches:
        full = len(labels) == recipe.batch_size
        try_algorithms(wanted=full)
        if graph is not None and full:
            graph(inputs, labels)
        else:
            _step(recipe, prepared, state, inputs, labels)
        state.schedule.step()
        if state.average:
            state.average.update()
        state.images += len(labels)
        state.batch += 1
        state.steps += 1


def _step(
    recipe: Recipe, prepared: Prepared, state: TrainingState, inputs: Tensor, labels: Tensor
) -> None:  # fmt: skip
    """What of a batch's step happens on the device alone."""
    state.optimizer.zero_grad(set_to_none=True)
    loss = gradients(recipe, prepared, inputs, labels)
    state.optimizer.step()
    state.loss.add_(loss * len(labels))  # summed on the device: reading it would wait for the GPU


def gradients(recipe: Recipe, prepared: Prepared, inputs: Tensor, labels: Tensor) -> Tensor:
    """Adds the batch's gradients to the parameters'; returns its mean loss, 0-dimensional.

    With a micro-batch the images go in pieces of nearly equal size; each piece's mean loss counts by its
    share of the batch, so that the sum is the batch's gradient (batch norm alone sees the piece).
    """
    model, device, micro_batch = prepared.runs, prepared.device, prepared.micro_batch
    precision = resolve_precision(recipe.precision, device)
    pieces = 1 if micro_batch is None else -(-len(labels) // micro_batch)
    losses = []
    for some, truth in zip(inputs.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
        with autocast(device, precision):
            logits = model(some).float()  # CUDA's autocast would leave the softmax in bf16
            loss = nn.functional.cross_entropy(logits, truth, label_smoothing=recipe.label_smoothing)
            loss = loss * (len(truth) / len(labels)) if pieces > 1 else loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return losses[0] if pieces == 1 else torch.stack(losses).sum()


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: Source, device: torch.device, precision: Precision, *, flip: bool = False,
    interrupted: Callable[[], bool] = never,
) -> Evaluation:  # fmt: skip
    """Mean cross entropy and top-1 accuracy over all images, centre crops, evaluation mode.

    `flip` scores a second time, over each image and its mirror image. Raises Interrupted when asked to.
    """
    model.eval()
    precision = resolve_precision(precision, device)
    batches = watched(data.evaluation(), interrupted)
    logits, labels = _logits(model, batches, len(data), device, precision)
    top1_flip = None
    if flip:
        batches = watched(data.evaluation(flipped=True), interrupted)
        mirrored, _ = _logits(model, batches, len(data), device, precision)
        both = logits.softmax(1) + mirrored.softmax(1)
        top1_flip = float((both.argmax(1) == labels).double().mean())
    loss = float(nn.functional.cross_entropy(logits, labels))
    predicted = logits.argmax(1)
    return Evaluation(loss, float((predicted == labels).double().mean()), predicted, labels, top1_flip)


def _logits(
    model: nn.Module, batches: Iterable[Batch], images: int, device: torch.device, precision: Precision
) -> tuple[Tensor, Tensor]:
    """(images, classes) float32 and (images,) int64, both on the CPU.

    Small tensors that stay, one of each batch, would lie in what the batch before has freed: on a CPU the
    next one would not fit there any more, and an epoch of AlexNet took 1.4 GB for nothing.
    """
    logits = torch.empty(0)
    labels = torch.empty(images, dtype=torch.int64, device=device)
    done = largest = 0
    for inputs, truth in batches:
        largest = max(largest, len(truth))
        try_algorithms(wanted=len(truth) == largest)
        with autocast(device, precision):
            output = model(inputs).float()
        if not done:
            logits = torch.empty((images, output.shape[1]), device=output.device)
        logits[done : done + len(truth)] = output
        labels[done : done + len(truth)] = truth
        done += len(truth)
    return logits[:done].cpu(), labels[:done].cpu()
