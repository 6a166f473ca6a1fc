"""Weights and checkpoints on disk: whole or absent, and a checkpoint knows when it is damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from caltech_hpo.data.cache import sync_folder, write_whole
from caltech_hpo.errors import WeightsError
from caltech_hpo.training.checkpoint_files import previous, unfinished

MAGIC = b"CHPOCKP1"
DIGEST_BYTES, LENGTH_BYTES = 32, 8


def save_weights(state: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Writes a state dictionary as safetensors: temporary file, fsync, rename, fsync of the folder.

    `about` goes into the file's metadata.
    """
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_whole(path, save(state, metadata=dict(about) if about else None))


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads what `save_weights` wrote, every key required. Raises RuntimeError for anything else."""
    from safetensors.torch import load_file

    found, own = load_file(path), model.state_dict()
    other = [name for name, value in found.items() if name in own and value.dtype != own[name].dtype]
    if other:  # torch would convert, and integers are no weights
        raise RuntimeError(f"{other[0]} is {found[other[0]].dtype}, not {own[other[0]].dtype}")
    model.load_state_dict(found, strict=True)


def weights_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises WeightsError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: is no safetensors file: {error}", "give a file that caltech-hpo has written"
        ) from error


def save_checkpoint(path: Path, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Writes tensors and a JSON document under a SHA-256; the checkpoint before is kept until this is there.

    Magic, SHA-256 of the rest, the document's length (8 bytes, little-endian), the document, safetensors.
    """
    from safetensors.torch import save

    text = json.dumps(document).encode()
    body = [len(text).to_bytes(LENGTH_BYTES, "little"), text, save(tensors)]
    digest = hashlib.sha256()
    for part in body:
        digest.update(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    try:
        with temporary.open("wb") as file:
            file.writelines([MAGIC, digest.digest(), *body])
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            path.replace(previous(path))
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint at `path`, or the one before if that is damaged or absent; None without a whole one."""
    for candidate in (path, previous(path)):
        found = read_checkpoint(candidate)
        if found is not None:
            return found
    return None


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """One file's tensors and document; None where it is absent or not what was written."""
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    start = len(MAGIC) + DIGEST_BYTES
    body = memoryview(content)[start:]
    if content[: len(MAGIC)] != MAGIC or hashlib.sha256(body).digest() != content[len(MAGIC) : start]:
        return None
    length = int.from_bytes(body[:LENGTH_BYTES], "little")
    document: dict[str, Any] = json.loads(bytes(body[LENGTH_BYTES : LENGTH_BYTES + length]))
    return load(bytes(body[LENGTH_BYTES + length :])), document
