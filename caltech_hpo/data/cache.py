"""Decodes every image of a split once into one memory-mapped file of uint8 pixels.

File: the pixels of all images one after another, each (height, width, 3) uint8 RGB; then a JSON
index; then its length in bytes (8, little-endian); then the magic. The file appears under its name
only when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from caltech_hpo.data.dataset import Sample
from caltech_hpo.data.decode import DECODER_VERSION, Pixels, decode_all
from caltech_hpo.data.files import Faults, shown
from caltech_hpo.errors import DataError, UnreadableImagesError

# (what is being done, how many are done, how many there are)
Progress = Callable[[str, int, int], None]

MAGIC = b"CHPOPIX1"
WAIT = 2.0  # seconds between two words of a program that waits for another


@dataclass(frozen=True)
class LabeledImages:
    """Decoded images: each (height, width, 3) uint8 RGB with its short side equal to `resize`.

    `labels` is (n,) int64. The arrays are views into the memory map. `+` concatenates.
    """

    images: list[Pixels]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def __add__(self, other: LabeledImages) -> LabeledImages:
        return LabeledImages(self.images + other.images, np.concatenate([self.labels, other.labels]))


def cache_key(root: Path, samples: Sequence[Sample], resize: int) -> str:
    """24 hexadecimal digits over the folder, the files with their sizes and times, labels and `resize`."""
    total = hashlib.sha256(f"{DECODER_VERSION} {resize} {root.absolute()}\n".encode())
    for sample in samples:
        try:
            status = (root / sample.path).stat()
        except OSError as error:
            raise DataError(f"{root / sample.path}: {error.strerror}", "check the data folder") from error
        total.update(f"{sample.path}\0{sample.label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:24]


def build_cache(
    root: Path, samples: Sequence[Sample], resize: int, folder: Path, *, label: str,
    skip_unreadable: bool = False, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """The cache file of these samples, made unless it is there. Returns its path.

    Raises UnreadableImagesError naming the files that cannot be decoded, unless `skip_unreadable`
    leaves them out; DataError when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cache_key(root, samples, resize)}.pixels"
    if not is_whole(path):
        with _lock(path.with_suffix(".lock"), label, len(samples), progress):
            if not is_whole(path):
                _write_cache(path, root, samples, resize, label, progress)
    unreadable: dict[str, str] = read_index(path)["unreadable"]
    if unreadable and not skip_unreadable:
        faults = Faults()
        for name, why in unreadable.items():
            faults.add(f"{shown(root / name)}: {why}")
        raise UnreadableImagesError(
            f"{faults.count} unreadable image(s) in the {label} split:\n{faults}",
            "replace or remove them, or go on without them: --skip-unreadable",
        )
    return path


def waits_for(lock: FileLock, seconds: float) -> Iterator[None]:
    """Yields whenever another has held the lock for so many more seconds; ends when it is ours."""
    while True:
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            yield
        else:
            return


@contextlib.contextmanager
def _lock(file: Path, label: str, images: int, progress: Progress | None) -> Iterator[None]:
    """The lock on a cache file; whoever waits for another program hears why."""
    lock = FileLock(file)
    for _ in waits_for(lock, WAIT):
        if progress:
            progress(f"waiting for another program that decodes these {label} images", 0, images)
    try:
        yield
    finally:
        lock.release()


def _write_cache(
    path: Path, root: Path, samples: Sequence[Sample], resize: int, label: str, progress: Progress | None
) -> None:
    temporary = path.with_suffix(".tmp")
    shapes: list[tuple[int, int]] = []
    labels: list[int] = []
    unreadable: dict[str, str] = {}
    try:
        with temporary.open("wb") as file:
            decoded = decode_all([root / sample.path for sample in samples], resize)
            for done, (sample, pixels) in enumerate(zip(samples, decoded, strict=True), start=1):
                if isinstance(pixels, str):
                    unreadable[sample.path] = pixels
                else:
                    file.write(pixels.data)
                    shapes.append((pixels.shape[0], pixels.shape[1]))
                    labels.append(sample.label)
                if progress:
                    progress(f"decoding {label} images", done, len(samples))
            index = json.dumps({"shapes": shapes, "labels": labels, "unreadable": unreadable}).encode()
            file.write(index + len(index).to_bytes(8, "little") + MAGIC)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{path.parent}: the disk is full", "make room, or give another --home"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes the file: temporary file, fsync, rename, fsync of the folder."""
    with whole_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path, *, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file that appears at `path` when it is whole; the one before gets the name `previous`, if given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write too
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_index(path: Path) -> dict[str, Any]:
    """The JSON index at the end of a cache file. Raises DataError for a damaged file."""
    damaged = DataError(f"{path}: the pixel cache is damaged", "delete this file; it is made again")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < 16:
            raise damaged
        file.seek(-16, os.SEEK_END)
        length = int.from_bytes(file.read(8), "little")
        if file.read(8) != MAGIC or length > size - 16:
            raise damaged
        file.seek(size - 16 - length)
        index: dict[str, Any] = json.loads(file.read(length))
    if sum(h * w * 3 for h, w in index["shapes"]) != size - 16 - length:
        raise damaged  # reading past the end of a map would kill the process with SIGBUS
    return index


def is_whole(path: Path) -> bool:
    """Whether the cache file is there and undamaged; a damaged one is made again."""
    try:
        read_index(path)
    except (FileNotFoundError, DataError):
        return False
    return True


def open_cache(path: Path) -> LabeledImages:
    """Maps a cache file; nothing is read until an image is used."""
    index = read_index(path)
    pixels = np.memmap(path, dtype=np.uint8, mode="r")
    images: list[Pixels] = []
    offset = 0
    for height, width in index["shapes"]:
        size = height * width * 3
        images.append(pixels[offset : offset + size].reshape(height, width, 3))
        offset += size
    return LabeledImages(images, np.array(index["labels"], dtype=np.int64))
