"""The training loop: `train` is a generator of epochs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caltech_hpo.data.augment import AUGMENTATIONS
from caltech_hpo.data.batches import HALF, IMAGENET, BatchPlan, evaluation_batches, training_batches
from caltech_hpo.data.cache import LabeledImages
from caltech_hpo.errors import WeightsError
from caltech_hpo.spec import EpochResult, Precision, Recipe
from caltech_hpo.training.device import autocast, resolve_precision
from caltech_hpo.training.models import NO_WEIGHTS, apply_freeze, build_model, training_mode, weights_sha256


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split. `predictions` and `labels` are (n,) int64 on the CPU."""

    loss: float
    top1: float
    predictions: Tensor
    labels: Tensor


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, independent of every other purpose's."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def model_for(recipe: Recipe, device: torch.device) -> nn.Module:
    """The recipe's model on the device, channels_last, frozen as the recipe says.

    Raises WeightsError when the weights file is missing, unsuitable, or another than the recipe's.
    """
    if recipe.weights_sha256 and weights_sha256(recipe.weights) != recipe.weights_sha256:
        raise WeightsError(
            f"{recipe.weights}: the file has changed since the recipe was made",
            "put the file back, or search again with the new one as NAME@2",
        )
    model = build_model(
        recipe.architecture, recipe.weights, recipe.classes, seed=derive_seed(recipe.seed, "weights")
    )
    apply_freeze(model, recipe.architecture, recipe.freeze)
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def plan_for(recipe: Recipe, device: torch.device) -> BatchPlan:
    """How the recipe's images become batches; pretrained weights bring their own normalisation."""
    normalization = HALF if recipe.weights == NO_WEIGHTS else IMAGENET
    return BatchPlan(recipe.batch_size, recipe.crop, normalization, device)


def train(
    recipe: Recipe, model: nn.Module, training: LabeledImages, validation: LabeledImages | None,
    device: torch.device,
) -> Iterator[EpochResult]:  # fmt: skip
    """Trains `model` in place and yields after every epoch; between epochs it may be saved or left.

    SGD with momentum and weight decay, the learning rate falling by gamma every step_size epochs,
    cross entropy. `validation` None trains without validation scores. The random draws of an
    epoch depend on the recipe's seed and the epoch alone.
    """
    plan = plan_for(recipe, device)
    precision = resolve_precision(recipe.precision, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.step_size, recipe.gamma)
    for epoch in range(1, recipe.epochs + 1):
        start = time.perf_counter()
        learning_rate = float(schedule.get_last_lr()[0])
        batches = training_batches(
            training, plan, AUGMENTATIONS[recipe.augmentation],
            order=_generator(recipe.seed, "order", epoch),
            draws=_generator(recipe.seed, "augmentation", epoch),
        )  # fmt: skip
        torch.manual_seed(derive_seed(recipe.seed, "dropout", epoch))  # dropout takes no generator
        training_loss = train_epoch(model, batches, optimizer, device, precision)
        schedule.step()
        scores = evaluate(model, validation, plan, precision) if validation is not None else None
        yield EpochResult(
            epoch=epoch,
            learning_rate=learning_rate,
            training_loss=training_loss,
            validation_loss=scores.loss if scores else None,
            validation_top1=scores.top1 if scores else None,
            images=len(training),
            seconds=time.perf_counter() - start,
        )


def _generator(seed: int, *purpose: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def train_epoch(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer,
    device: torch.device, precision: Precision,
) -> float:  # fmt: skip
    """One pass of gradient steps; returns the mean loss over the images."""
    training_mode(model)
    total = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32)
    images = 0
    for pixels, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = nn.functional.cross_entropy(model(pixels), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(labels)  # summed on the device: reading it would wait for the GPU
        images += len(labels)
    return float(total) / images


@torch.inference_mode()
def evaluate(model: nn.Module, data: LabeledImages, plan: BatchPlan, precision: Precision) -> Evaluation:
    """Mean cross entropy and top-1 accuracy over all images, centre crops, evaluation mode."""
    model.eval()
    precision = resolve_precision(precision, plan.device)
    losses, predictions, labels = [], [], []
    for pixels, truth in evaluation_batches(data, plan):
        with autocast(plan.device, precision):
            logits = model(pixels)
        logits = logits.float()
        losses.append(nn.functional.cross_entropy(logits, truth, reduction="sum"))
        predictions.append(logits.argmax(1))
        labels.append(truth)
    predicted, true = torch.cat(predictions).cpu(), torch.cat(labels).cpu()
    loss = float(torch.stack(losses).sum()) / len(true)
    return Evaluation(loss, float((predicted == true).double().mean()), predicted, true)
