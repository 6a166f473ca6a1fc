"""An image file to 8-bit RGB pixels, or to the reason why not."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import re
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from caltech_hpo.data.files import read_regular, shown
from caltech_hpo.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MOST_PIXELS = 50_000_000  # of a file, and of what is kept of it
MOST_BYTES = 512 << 20  # of a file, which is read as a whole: 50 megapixels of 4 colours of 16 bits are 381
# Decoding passes over all pixels once for each scan of a JPEG, and a scan may be 10 bytes: 1 MB of them
# on 49 megapixels would take an hour (40 ms a scan measured). Cameras write at most about 10.
MOST_SCANNED = 40 * MOST_PIXELS
SCAN_BYTES = 10
DECODER_VERSION = 2  # raise it when decode_image returns other pixels for the same file
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # TIFF's and EXIF's tags


class UnreadableError(ValueError):
    """A file that is no image we take; the message is the reason."""


def decode_image(path: Path, resize: int) -> Pixels:
    """The image as (height, width, 3) uint8 RGB, short side `resize`, aspect ratio kept.

    The file's content decides its format, not its name; of several frames or pages the first is taken.
    EXIF orientation is applied; the resize is Pillow's antialiased bilinear, as torchvision's Resize does
    on a PIL image. Raises UnreadableError, or whatever Pillow does for a damaged file.
    """
    from PIL import Image

    content = _read(path)
    with _identified(content) as opened:
        width, height = opened.size
        short, long = sorted((width, height))
        scaled = int(resize * long / short)  # torchvision rounds down, and so must we
        if width * height > MOST_PIXELS:
            raise UnreadableError(f"{width} x {height} pixels: more than {MOST_PIXELS // 10**6} megapixels")
        if resize * scaled > MOST_PIXELS:
            raise UnreadableError(f"{width} x {height} pixels: too long and narrow")
        if opened.format in ("JPEG", "MPO"):
            _check_scans(content, width * height)
        elif opened.format == "TIFF":
            _check_grey(opened)
        opened.load()
        image = to_rgb(upright(opened))
    width, height = image.size
    size = (resize, scaled) if width <= height else (scaled, resize)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def _read(path: Path) -> bytes:
    """The file's content. Were Pillow to read the file, a chunk said to be of 4 GB would take 4 GB."""
    content = read_regular(path, MOST_BYTES)
    if content is None:
        raise UnreadableError(f"a file of more than {MOST_BYTES >> 20} MiB")
    if not content:
        raise UnreadableError("the file is empty")
    return content


def _identified(content: bytes) -> Image:
    """The image with its header read, and not yet its pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        opened: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnreadableError(f"another format than {', '.join(FORMATS)}, no image, or damaged") from None
    except Image.DecompressionBombError:
        raise UnreadableError(f"more than {MOST_PIXELS // 10**6} megapixels") from None
    return opened


def _check_scans(content: bytes, pixels: int) -> None:
    """Refuses a JPEG whose scans would be decoded for minutes."""
    if len(content) // SCAN_BYTES * pixels > MOST_SCANNED:
        scans = count_scans(content)
        if scans * pixels > MOST_SCANNED:
            raise UnreadableError(f"a JPEG of {scans} scans, which would take minutes to decode")


def count_scans(content: bytes) -> int:
    """How many scans a JPEG has, up to its end or to where it is damaged."""
    marker = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither a stuffed 0 nor a restart
    scans = place = 0
    while found := marker.search(content, place):
        code, place = found[1][0], found.end()
        if code == 0xD9:
            break
        if code not in (0x01, 0xD8):  # the others have a length
            place += max(2, int.from_bytes(content[place : place + 2]))
        scans += code == 0xDA
    return scans


def _check_grey(opened: Image) -> None:
    """Refuses what Pillow would show nearly black (12-bit grey) or as a negative (16-bit, white is zero)."""
    if opened.mode.startswith("I;16"):
        tags = opened.tag_v2  # type: ignore[attr-defined]
        if tags.get(BITS_PER_SAMPLE) != (16,) or tags.get(PHOTOMETRIC) == 0:
            raise UnreadableError("grey of 12 bits, or with white as zero: save it with 8 bits")


def upright(image: Image) -> Image:
    """The image as it is meant to be seen. An orientation that cannot be read does not spoil the image."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata raises nearly anything
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image) -> Image:
    """8-bit RGB. Alpha is dropped, 16-bit grey scaled to 8 bits; raises UnreadableError for other depths.

    Pillow alone would clip 16-bit grey to white, and floats from 0 to 1 to black.
    """
    from PIL import Image as pillow

    if image.mode.startswith("I;16"):
        image = pillow.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableError(f"pixels of 32 bits (mode {image.mode}): save the image with 8 or 16 bits")
    return image.convert("RGB")


def usable_cores() -> int:
    """The cores that this process may use: a batch system or `taskset` may have given it only some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows bind no process


def decode_all(paths: Sequence[Path], resize: int) -> Iterator[Pixels | str]:
    """Each file's pixels, or the reason why it cannot be read, in order; on all cores.

    Threads suffice: Pillow releases the interpreter lock while it decodes and resizes. A window
    of pending results keeps memory bounded.
    """
    _silence_pillow()
    workers = usable_cores()
    with ThreadPoolExecutor(workers) as pool:
        window: deque[Future[Pixels | str]] = deque()
        for path in paths:
            window.append(pool.submit(_decode_or_reason, path, resize))
            if len(window) > 8 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()


def _silence_pillow() -> None:
    """What Pillow has to say of a file is in the reason, or of no use to whoever sees the terminal."""
    from PIL import _imaging

    warnings.filterwarnings("ignore", module=r"PIL\.")
    log = logging.getLogger("PIL")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    with contextlib.suppress(AttributeError, OSError):  # a Pillow that keeps libtiff to itself
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler  # its own writes to stderr
        set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        set_handler(None)


def _decode_or_reason(path: Path, resize: int) -> Pixels | str:
    try:
        return decode_image(path, resize)
    except UnreadableError as error:
        return str(error)
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged file
        # The system's fault, not the image's, must not be remembered as an unreadable image.
        if isinstance(error, MemoryError):
            reason = "out of memory"
        elif isinstance(error, OSError) and error.errno is not None:
            reason = error.strerror or str(error)
        else:
            return shown(f"damaged: {type(error).__name__}: {error}", 200)
        raise DataError(f"{shown(path)}: {reason}", "mend that and run the command again") from error
