"""Weights and checkpoints on disk: whole or absent, and a checkpoint knows when it is damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from caltech_hpo.data.cache import sync_folder
from caltech_hpo.errors import WeightsError
from caltech_hpo.training.checkpoint_files import previous, remove, unfinished

DIGEST, DOCUMENT = "sha256", "document"  # in a checkpoint's metadata
SEAL = f'"{DIGEST}":"'.encode()  # before the digest in the file: elsewhere in a header quotes are escaped
NO_DIGEST = "0" * 64
MOST_HEADER = 100_000_000  # bytes; safetensors reads no larger one
CHUNK = 1 << 20
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust ends its words for one


def save_weights(state: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Writes a state dictionary as safetensors: temporary file, fsync, rename, fsync of the folder.

    `about` goes into the file's metadata.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with _written(tensors, path, dict(about) if about else None) as made:
        with made.open("r+b") as file:
            os.fsync(file.fileno())
        made.replace(path)
        sync_folder(path.parent)


@contextlib.contextmanager
def _written(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> Iterator[Path]:
    """A safetensors file, written from where the tensors are, that shall get the name `path`. Raises OSError.

    It is in a folder of its own, which goes with all that is in it: the library writes to a file of
    another name, which stays where it is killed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = unfinished(path)
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / path.name
    try:
        save_file(tensors, made, metadata)
        made.chmod(folder.stat().st_mode & 0o666)  # the library's is for its owner alone
        yield made
    except SafetensorError as error:
        if found := SYSTEM_ERROR.search(str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        remove(folder)


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

    A safetensors file whose metadata holds both, the digest of everything else in the file. The tensors
    (CPU, contiguous, each with memory of its own) are written from where they are: copies of them, kept
    beside the training, made a worker that trains an AlexNet twice as large.
    """
    about = {DOCUMENT: json.dumps(document), DIGEST: NO_DIGEST}
    with _written(tensors, path, about) as made:
        with made.open("r+b") as file:
            place, _, digest = _digest(file)
            file.seek(place)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            path.replace(previous(path))
        made.replace(path)
        sync_folder(path.parent)


def _digest(file: BinaryIO) -> tuple[int, bytes, bytes]:
    """Where a checkpoint's digest is, the one that is there, and the one of what is before and after it.

    Raises ValueError for a file that has no place for one.
    """
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), MOST_HEADER))
    place = head.find(SEAL) + len(SEAL)
    end = place + len(NO_DIGEST)
    if place < len(SEAL) or end > len(head):
        raise ValueError("no checkpoint")
    digest = hashlib.sha256(head[:place])
    digest.update(head[end:])
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return place, head[place:end], digest.hexdigest().encode()


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
            _, there, digest = _digest(file)
        if there == digest:
            with safe_open(path, framework="pt") as opened:
                document: dict[str, Any] = json.loads(opened.metadata()[DOCUMENT])
                return opened.get_tensors(), document
    return None
