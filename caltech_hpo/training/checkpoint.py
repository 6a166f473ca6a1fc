"""Weights on disk: a safetensors file, whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from caltech_hpo.data.cache import sync_folder


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the state dictionary as safetensors: temporary file, fsync, rename, fsync of the folder."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(state, temporary)
        temporary.chmod(0o644)  # safetensors makes files for their owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads what `save_weights` wrote, every key required."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path), strict=True)
