"""Decodes every image of a split once into one memory-mapped file of uint8 pixels.

File: the pixels of all images one after another, each (height, width, 3) uint8 RGB; then a JSON
index; then its length in bytes (8, little-endian); then the magic. The file appears under its name
only when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from caltech_hpo.data.dataset import Sample
from caltech_hpo.errors import DataError, UnreadableImagesError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
# (what is being done, how many are done, how many there are)
Progress = Callable[[str, int, int], None]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAGIC = b"CHPOPIX1"
MOST_PIXELS = 50_000_000  # of a file, and of what is kept of it
DECODER_VERSION = 2  # raise it when decode_image returns other pixels for the same file


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


def decode_image(path: Path, resize: int) -> Pixels:
    """The image as (height, width, 3) uint8 RGB, short side `resize`, aspect ratio kept.

    The file's content decides its format, not its name. EXIF orientation is applied; the resize
    is Pillow's antialiased bilinear, as torchvision's Resize does on a PIL image.
    """
    from PIL import Image, ImageOps

    with Image.open(path, formats=FORMATS) as opened:
        width, height = opened.size
        short, long = sorted((width, height))
        scaled = int(resize * long / short)  # torchvision rounds down, and so must we
        if max(width * height, resize * scaled) > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels: too large, or too long and narrow")
        image = to_rgb(ImageOps.exif_transpose(opened))
    width, height = image.size
    size = (resize, scaled) if width <= height else (scaled, resize)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def to_rgb(image: Image) -> Image:
    """8-bit RGB. Alpha is dropped, 16-bit grey scaled to 8 bits; raises ValueError for other depths.

    Pillow alone would clip 16-bit grey to white, and floats from 0 to 1 to black.
    """
    from PIL import Image as pillow

    if image.mode.startswith("I;16"):
        image = pillow.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}): save the image with 8 or 16 bits")
    return image.convert("RGB")


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
        with FileLock(path.with_suffix(".lock")):
            if not is_whole(path):
                _write_cache(path, root, samples, resize, label, progress)
    unreadable: dict[str, str] = read_index(path)["unreadable"]
    if unreadable and not skip_unreadable:
        shown = "\n".join(f"  {root / name}: {why}" for name, why in list(unreadable.items())[:10])
        more = f"\n  and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
        raise UnreadableImagesError(
            f"{len(unreadable)} unreadable image(s) in the {label} split:\n{shown}{more}",
            "replace or remove them, or go on without them: --skip-unreadable",
        )
    return path


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


def decode_all(paths: Sequence[Path], resize: int) -> Iterator[Pixels | str]:
    """Each file's pixels, or the reason why it cannot be read, in order; on all cores.

    Threads suffice: Pillow releases the interpreter lock while it decodes and resizes. A window
    of pending results keeps memory bounded.
    """
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        window: deque[Future[Pixels | str]] = deque()
        for path in paths:
            window.append(pool.submit(_decode_or_reason, path, resize))
            if len(window) > 8 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()


def _decode_or_reason(path: Path, resize: int) -> Pixels | str:
    try:
        return decode_image(path, resize)
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged file
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            # The system's fault, not the image's: must not be remembered as an unreadable image.
            reason = error.strerror if isinstance(error, OSError) else "out of memory"
            raise DataError(f"{path}: {reason}", "mend that and run the command again") from error
        return f"{type(error).__name__}: {error}"[:200]


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
