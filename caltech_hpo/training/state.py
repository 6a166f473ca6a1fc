"""Where a training stands between two batches, and how it is put back there."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from caltech_hpo.spec import EpochResult, Recipe
from caltech_hpo.training.average import WeightAverage
from caltech_hpo.training.best import BestWeights
from caltech_hpo.training.optimizers import make_optimizer, make_schedule
from caltech_hpo.training.prepare import Prepared, derive_seed

BEST = "best."  # before the names of the best epoch's tensors


@dataclass
class TrainingState:
    """Everything of a training that changes, beside the model. `epoch` (from 1) is the one being trained,
    `batch` how many of its batches are done, `loss` the sum over its `images` so far, `steps` all steps.

    An epoch's draws depend on the recipe's seed and the epoch alone: only within one are random states
    part of the state.
    """

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: WeightAverage | None
    order: torch.Generator
    draws: torch.Generator
    loss: Tensor
    epoch: int = 1
    batch: int = 0
    images: int = 0
    steps: int = 0
    seconds: float = 0.0  # of the epoch, before it was interrupted
    learning_rate: float = 0.0  # at the epoch's beginning
    results: list[EpochResult] = field(default_factory=list)
    best: BestWeights | None = None  # None: nobody wants them


def begin(recipe: Recipe, prepared: Prepared) -> TrainingState:
    """The state before the first batch."""
    optimizer = make_optimizer(prepared.model, recipe)
    device = prepared.device
    state = TrainingState(
        optimizer,
        make_schedule(optimizer, recipe, len(prepared.training.sizes)),
        WeightAverage(prepared.runs, recipe.ema) if recipe.ema else None,
        torch.Generator(),
        torch.Generator(),
        torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32),
    )
    begin_epoch(state, recipe, 1)
    return state


def begin_epoch(state: TrainingState, recipe: Recipe, epoch: int) -> None:
    """Seeds what an epoch draws from, and empties its sums."""
    state.epoch, state.batch, state.images, state.seconds = epoch, 0, 0, 0.0
    state.learning_rate = float(state.schedule.get_last_lr()[0])
    state.loss.zero_()
    state.order.manual_seed(derive_seed(recipe.seed, "order", epoch))
    state.draws.manual_seed(derive_seed(recipe.seed, "augmentation", epoch))
    torch.manual_seed(derive_seed(recipe.seed, "dropout", epoch))  # dropout takes no generator


@contextlib.contextmanager
def captured(state: TrainingState, prepared: Prepared) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """The state as tensors and a JSON document, to be written between two batches.

    The tensors are the training's own: they change once it goes on. The order of an epoch is drawn anew
    from its seed; what does not learn comes from the recipe's weights.
    """
    average = state.average
    swapped = average is not None and average.swapped  # the model holds the averages while a result is out
    if average and swapped:
        average.swap()
    try:
        yield _captured(state, prepared)
    finally:
        if average and swapped:
            average.swap()


def _captured(state: TrainingState, prepared: Prepared) -> tuple[dict[str, Tensor], dict[str, Any]]:
    average = state.average
    tensors = {f"model.{name}": value for name, value in changing(prepared.model).items()}
    groups = state.optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, values in groups["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    if average:
        tensors |= {f"average.{number}": value for number, value in enumerate(average.averages)}
    if state.best:
        tensors |= {f"{BEST}{name}": value for name, value in state.best.tensors.items()}
    tensors |= {"loss": state.loss, "random.draws": state.draws.get_state()}
    tensors["random.cpu"] = torch.get_rng_state()
    if prepared.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(prepared.device)
    elif prepared.device.type == "mps":
        tensors["random.mps"] = torch.mps.get_rng_state()
    document = {
        "epoch": state.epoch, "batch": state.batch, "images": state.images, "steps": state.steps,
        "seconds": state.seconds, "learning_rate": state.learning_rate,
        "average_steps": average.steps if average else 0,
        "best_score": state.best.score if state.best else None,
        "micro_batch": prepared.micro_batch,
        "optimizer": {"groups": groups["param_groups"], "plain": plain},
        "results": [json.loads(result.model_dump_json()) for result in state.results],
    }  # fmt: skip
    return {name: value.detach() for name, value in tensors.items()}, document


def checkpoint_bytes(state: TrainingState, prepared: Prepared) -> int:
    """What the tensors of a checkpoint take after the first step, the best epoch's weights included."""
    with captured(state, prepared) as (tensors, _):
        best = {} if state.best else changing(prepared.model)
        return sum(tensor.nbytes for tensor in (*tensors.values(), *best.values()))


def restore(
    state: TrainingState, recipe: Recipe, prepared: Prepared, tensors: dict[str, Tensor],
    document: dict[str, Any],
) -> None:  # fmt: skip
    """Puts a training that has just begun to where one of the same recipe was captured; copies."""
    model = changing(prepared.model)
    with torch.no_grad():
        for name, value in model.items():
            value.copy_(tensors[f"model.{name}"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of")  # steps without an optimizer's
        for _ in range(document["steps"]):
            state.schedule.step()
    states: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in document["optimizer"]["plain"].items()
    }
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            states.setdefault(int(index), {})[key] = value
    state.optimizer.load_state_dict({"state": states, "param_groups": document["optimizer"]["groups"]})
    _lay_out(state.optimizer)
    if state.average:
        state.average.load(
            [tensors[f"average.{number}"] for number in range(len(state.average.averages))],
            document["average_steps"],
        )
    if state.best:
        kept = {
            name.removeprefix(BEST): value.to(prepared.device, copy=True)
            for name, value in tensors.items() if name.startswith(BEST)
        }  # fmt: skip
        state.best = BestWeights(max(state.best.score, document["best_score"]), kept)
    begin_epoch(state, recipe, document["epoch"])
    state.batch = document["batch"]
    state.images, state.steps, state.seconds = document["images"], document["steps"], document["seconds"]
    state.learning_rate = document["learning_rate"]
    state.results = [EpochResult.model_validate(result) for result in document["results"]]
    state.loss.copy_(tensors["loss"])
    state.draws.set_state(tensors["random.draws"])
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and prepared.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], prepared.device)
    if "random.mps" in tensors and prepared.device.type == "mps":
        torch.mps.set_rng_state(tensors["random.mps"])


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Copies the optimizer's tensors, laid out as their parameters are: a GPU's fused steps refuse others."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                like = parameter if value.shape == parameter.shape else value
                values[name] = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def changing(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors that training changes: parameters that learn, and all buffers."""
    found: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return found | dict(model.named_buffers())
