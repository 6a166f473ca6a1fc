"""Which parts of a model learn, and what the others do meanwhile."""

from __future__ import annotations

from torch import nn

from caltech_hpo.errors import UsageError
from caltech_hpo.spec import Hyperparameters
from caltech_hpo.terms import TIMM
from caltech_hpo.training.architectures import architecture_info
from caltech_hpo.training.timm_models import timm_groups


def apply_freeze(model: nn.Module, recipe: Hyperparameters) -> None:
    """Sets requires_grad: "features" trains only the classifier, "classifier" only the features.

    As in the report, freezing the classifier freezes the new, random head as well. Either way the
    first `frozen_blocks` blocks do not learn. Raises UsageError when a timm model has fewer, or when
    nothing is left to learn.
    """
    info = architecture_info(recipe.architecture)
    prefix = f"{info.classifier}."
    early = early_parameters(model, recipe)
    for name, parameter in model.named_parameters():
        part = "classifier" if name.startswith(prefix) else "features"
        parameter.requires_grad_(part != recipe.freeze and id(parameter) not in early)
    if not _learns(model):
        raise UsageError(
            f"freeze {recipe.freeze} and frozen_blocks {recipe.frozen_blocks} leave nothing of "
            f"{recipe.architecture} to train",
            "lower frozen_blocks in [recipe] or [space]",
        )


def early_parameters(model: nn.Module, recipe: Hyperparameters) -> set[int]:
    """The ids of the parameters in the first `frozen_blocks` blocks."""
    if not recipe.frozen_blocks:
        return set()
    if not recipe.architecture.startswith(TIMM):
        blocks = architecture_info(recipe.architecture).blocks(model)[: recipe.frozen_blocks]
        return {id(parameter) for block in blocks for parameter in block.parameters()}
    groups = timm_groups(model)
    blocks_there = max(groups.values())  # the last group holds the head
    if recipe.frozen_blocks > blocks_there:
        raise UsageError(
            f"frozen_blocks {recipe.frozen_blocks}: {recipe.architecture} has {blocks_there} blocks",
            "lower it in [recipe] or [space]",
        )
    frozen = {name for name, group in groups.items() if group < recipe.frozen_blocks}
    return {id(parameter) for name, parameter in model.named_parameters() if name in frozen}


def split_frozen(model: nn.Module, architecture: str) -> tuple[nn.Module, nn.Module] | None:
    """The leading blocks that do not learn, and the rest: rest(prefix(images)) is model(images).

    None where the first block learns already. The modules are the model's own.
    """
    info = architecture_info(architecture)
    head = {id(parameter) for parameter in model.get_submodule(info.head).parameters()}
    blocks = info.blocks(model)
    frozen = 0
    for block in blocks:
        if any(p.requires_grad and id(p) not in head for p in block.parameters()):
            break
        frozen += 1
    if not frozen:
        return None
    rest = [*blocks[frozen:], model.get_submodule(info.classifier)]
    return nn.Sequential(*blocks[:frozen]), nn.Sequential(*rest)


def training_mode(model: nn.Module, prefix: nn.Module | None = None) -> None:
    """Training mode, except for frozen batch norms, whose statistics must stay those of the weights.

    Nothing random happens in a frozen `prefix` either: its outputs are the same whether they are stored
    or computed anew.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not _learns(module):
            module.eval()
    for module in prefix.modules() if prefix is not None else ():
        # a timm model as a prefix holds the head too, which learns
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = False


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
