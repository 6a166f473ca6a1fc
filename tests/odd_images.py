"""Image files as other programs, cameras and enemies write them, made on the spot."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (12, 8)
# A ramp, so that every pixel and every turn can be told apart.
RAMP = (np.arange(SIZE[0] * SIZE[1] * 3, dtype=np.uint32) * 255 // (SIZE[0] * SIZE[1] * 3)).astype(np.uint8)
RGB = RAMP.reshape(SIZE[1], SIZE[0], 3)
GREY = RGB[..., 0]
ORIENTATION = 0x0112


def saved(image: Image.Image, kind: str, **options) -> bytes:
    """The image as the bytes of a file. Copies are saved: Pillow leaves a format's settings on an image."""
    if "append_images" in options:
        options["append_images"] = [more.copy() for more in options["append_images"]]
    file = io.BytesIO()
    image.copy().save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    """Metadata that say which way is up."""
    made = Image.Exif()
    made[ORIENTATION] = orientation
    return made


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *before: bytes) -> bytes:
    """A PNG file of rows without their filter bytes, which are added; `before` are chunks."""
    length = len(rows) // height
    filtered = b"".join(b"\0" + rows[i * length : (i + 1) * length] for i in range(height))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(filtered))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + data + chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int, white_is_zero: bool, content: bytes) -> bytes:
    """A little-endian TIFF file of grey pixels without compression."""
    tags = {
        256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 122, 277: 1,
        278: height, 279: len(content),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + content


def with_exif(jpeg: bytes, content: bytes) -> bytes:
    """The JPEG file with other EXIF data put in front."""
    segment = b"Exif\0\0" + content
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def scan_bomb(scans: int) -> bytes:
    """A JPEG of 49 megapixels that repeats its smallest scan."""
    jpeg = saved(Image.new("L", (7000, 7000), 128), "JPEG", progressive=True, quality=50)
    smallest = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + smallest * scans + jpeg[-2:]
