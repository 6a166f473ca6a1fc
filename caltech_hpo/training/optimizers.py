"""A recipe's optimizer and learning-rate schedule, from torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from caltech_hpo.spec import Recipe
from caltech_hpo.training.architectures import architecture_info
from caltech_hpo.training.cuda_sgd import CudaSGD, layers_to_step

ONE_CYCLE_WARMUP = 0.3  # torch's and fastai's default
SHORTEST_CYCLE = 3  # steps; there is no rise and fall in fewer
FIRST_FACTOR = 0.01  # where a linear warm-up begins, as a share of the learning rate


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over what learns; the head in a group of its own, the last, where its rate differs."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": learning}]
    if recipe.head_lr_factor != 1:
        head_module = model.get_submodule(architecture_info(recipe.architecture).head)
        head = {id(p) for p in head_module.parameters()}
        rate = recipe.learning_rate * recipe.head_lr_factor
        groups = [
            {"params": [p for p in learning if id(p) not in head]},
            {"params": [p for p in learning if id(p) in head], "lr": rate},
        ]
        groups = [group for group in groups if group["params"]]
    fused = learning[0].device.type in ("cpu", "cuda")  # one pass over the memory of each parameter
    layers = layers_to_step(model)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=(recipe.momentum, 0.999),
            weight_decay=recipe.weight_decay, fused=fused,
        )  # fmt: skip
    options: dict[str, Any] = {
        "lr": recipe.learning_rate, "momentum": recipe.momentum, "nesterov": recipe.nesterov,
        "weight_decay": recipe.weight_decay, "fused": fused,
    }  # fmt: skip
    return CudaSGD(groups, layers, **options) if layers else torch.optim.SGD(groups, **options)


def make_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_an_epoch: int
) -> lr_scheduler.LRScheduler:
    """The schedule, to be stepped after every batch."""
    steps = recipe.epochs * steps_an_epoch
    if recipe.schedule == "one_cycle" and steps < SHORTEST_CYCLE:
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    if recipe.schedule == "one_cycle":
        # torch divides by what the rise lasts beyond its first step
        rise = max(recipe.warmup or ONE_CYCLE_WARMUP, 1.5 / steps)
        return lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps,
            pct_start=rise, cycle_momentum=False,
        )  # fmt: skip
    rising = round(recipe.warmup * steps)
    main: lr_scheduler.LRScheduler
    if recipe.schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - rising))
    else:
        main = lr_scheduler.StepLR(optimizer, recipe.step_size * steps_an_epoch, recipe.gamma)
    if not rising:
        return main
    warmup = lr_scheduler.LinearLR(optimizer, FIRST_FACTOR, total_iters=rising)
    return lr_scheduler.SequentialLR(optimizer, [warmup, main], milestones=[rising])
