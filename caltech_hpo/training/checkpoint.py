"""Weights and checkpoints on disk: whole or absent, and a checkpoint knows when it is damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from caltech_hpo.data.cache import whole_file
from caltech_hpo.errors import WeightsError
from caltech_hpo.training.checkpoint_files import previous
from caltech_hpo.training.tensor_files import safetensors_pieces

DIGEST, DOCUMENT = "sha256", "document"  # in a checkpoint's metadata
SEAL = f'"{DIGEST}":"'.encode()  # before the digest in the file: elsewhere in a header quotes are escaped
NO_DIGEST = b"0" * 64
MOST_HEADER = 100_000_000  # bytes; safetensors reads no larger one
CHUNK = 1 << 20


def save_weights(state: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Writes a state dictionary as safetensors: temporary file, fsync, rename, fsync of the folder.

    `about` goes into the file's metadata.
    """
    with whole_file(path) as file:
        file.writelines(safetensors_pieces(state, about))


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


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], document: dict[str, Any]) -> None:
    """Writes tensors and a JSON document under a SHA-256; the checkpoint before is kept until this is there.

    A safetensors file whose metadata holds both; the digest is of the file with zeros in its place. The
    tensors are written from where they are: with copies of them beside the training, a worker that trains
    an AlexNet was twice as large.
    """
    about = {DOCUMENT: json.dumps(document), DIGEST: NO_DIGEST.decode()}
    digest, place = hashlib.sha256(), 0
    with whole_file(path, previous=previous(path)) as file:
        for piece in safetensors_pieces(tensors, about):
            place = place or bytes(piece).index(SEAL) + len(SEAL)  # in the first one
            file.write(piece)
            digest.update(piece)
        file.seek(place)
        file.write(digest.hexdigest().encode())


def _digests(file: BinaryIO) -> tuple[bytes, bytes]:
    """The digest that a checkpoint says it has, and the one that it has.

    Raises ValueError for a file that says none.
    """
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), MOST_HEADER))
    place = head.index(SEAL) + len(SEAL)
    end = place + len(NO_DIGEST)
    digest = hashlib.sha256(head[:place] + NO_DIGEST + head[end:])
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return head[place:end], digest.hexdigest().encode()


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint at `path`, or the one before if that is damaged or absent; None without a whole one."""
    for candidate in (path, previous(path)):
        found = read_checkpoint(candidate)
        if found is not None:
            return found
    return None


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """One file's tensors and document; None where it is absent or not what was written.

    The tensors are the file's pages: they take no memory until they are read, and keep the file open.
    """
    from safetensors import safe_open

    with contextlib.suppress(FileNotFoundError, ValueError):
        with path.open("rb") as file:
            said, found = _digests(file)
        if said == found:
            with safe_open(path, framework="pt") as opened:
                document: dict[str, Any] = json.loads(opened.metadata()[DOCUMENT])
                return opened.get_tensors(), document
    return None
