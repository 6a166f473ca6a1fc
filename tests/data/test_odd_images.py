"""What becomes of odd image files: the right pixels, or a reason; never a warning on the user's terminal."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from odd_images import (
    GREY,
    RGB,
    SIZE,
    chunk,
    exif,
    png,
    saved,
    scan_bomb,
    tiff,
    with_exif,
)
from PIL import Image, ImageOps

from caltech_hpo.data.decode import count_scans, decode_all, decode_image
from caltech_hpo.errors import DataError

IMAGE = Image.fromarray(RGB)
TURNED = IMAGE.transpose(Image.Transpose.ROTATE_180)
PALETTE = IMAGE.quantize(16)
COLOURS = np.asarray(PALETTE.convert("RGB"))
WORDS = GREY.astype(np.uint16) * 257
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60, 3), dtype=np.uint8))
JPEG = saved(IMAGE, "JPEG")
SEVERAL = {"save_all": True, "append_images": [TURNED]}


def rgb(pixels):
    """(height, width) grey to RGB."""
    return np.stack([pixels] * 3, axis=-1)


def colours(file: bytes):
    """What Pillow makes of a file that it is trusted with."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


BITMAP = rgb(np.asarray(IMAGE.convert("1")).astype(np.uint8) * 255)
SHOWN = {
    "palette": (saved(PALETTE, "PNG"), COLOURS),
    "palette, alpha of each": (saved(PALETTE, "PNG", transparency=bytes(range(16))), COLOURS),
    "palette, one is clear": (saved(PALETTE, "PNG", transparency=3), COLOURS),
    "RGB, one is clear": (saved(IMAGE, "PNG", transparency=(0, 0, 1)), RGB),
    "RGBA": (saved(IMAGE.convert("RGBA"), "PNG"), RGB),
    "RGBA, all clear": (saved(Image.fromarray(np.dstack([RGB, 0 * GREY])), "PNG"), RGB),
    "grey": (saved(Image.fromarray(GREY), "PNG"), rgb(GREY)),
    "grey and alpha": (saved(Image.fromarray(GREY).convert("LA"), "PNG"), rgb(GREY)),
    "1 bit, PNG": (saved(IMAGE.convert("1"), "PNG"), BITMAP),
    "1 bit, BMP": (saved(IMAGE.convert("1"), "BMP"), BITMAP),
    "1 bit, TIFF": (saved(IMAGE.convert("1"), "TIFF"), BITMAP),
    "1 bit, fax": (saved(IMAGE.convert("1"), "TIFF", compression="group4"), BITMAP),
    "16 bits, grey": (png(*SIZE, 16, 0, WORDS.astype(">u2").tobytes()), rgb(GREY)),
    "16 bits, grey, TIFF": (tiff(*SIZE, 16, False, WORDS.tobytes()), rgb(GREY)),
    "16 bits, grey, big-endian": (
        saved(Image.frombytes("I;16B", SIZE, WORDS.astype(">u2").tobytes()), "TIFF"), rgb(GREY),
    ),
    "16 bits, grey and alpha": (
        png(*SIZE, 16, 4, np.dstack([WORDS, WORDS * 0]).astype(">u2").tobytes()), rgb(GREY),
    ),
    "16 bits, RGB": (png(*SIZE, 16, 2, (RGB.astype(np.uint16) * 256 + 200).astype(">u2").tobytes()), RGB),
    "white is zero": (tiff(*SIZE, 8, True, (255 - GREY).tobytes()), rgb(GREY)),
    "animated WebP": (saved(IMAGE, "WEBP", lossless=True, **SEVERAL), RGB),
    "animated PNG": (saved(IMAGE, "PNG", **SEVERAL), RGB),
    "pages": (saved(IMAGE, "TIFF", **SEVERAL), RGB),
    "two views of a camera": (saved(IMAGE, "MPO", **SEVERAL), colours(JPEG)),
    "PNG without its end": (saved(IMAGE, "PNG")[:-12], RGB),
    "EXIF that is none": (with_exif(JPEG, b"garbage!"), colours(JPEG)),
    "EXIF that is empty": (with_exif(JPEG, b""), colours(JPEG)),
    "EXIF that points out of it": (with_exif(JPEG, b"II*\0\xff\xff\xff\xff"), colours(JPEG)),
    "EXIF with a count of 2**31": (
        with_exif(JPEG, b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\x7f\x08\0\0\0"), colours(JPEG),
    ),
}  # fmt: skip
REFUSED = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello\n" * 100, "another format"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "another format"),
    "GIF": (saved(IMAGE, "GIF"), "another format than JPEG, PNG, WEBP, BMP, TIFF"),
    "ICO": (saved(IMAGE.resize((16, 16)), "ICO"), "another format"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "another format"),
    "floats": (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "32 bits"),
    "32 bits": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "32 bits"),
    "12 bits": (tiff(*SIZE, 12, False, bytes(18 * 8)), "grey of 12 bits"),
    "16 bits, white is zero": (tiff(*SIZE, 16, True, WORDS.tobytes()), "white as zero"),
    "a text that grows": (
        png(*SIZE, 8, 2, RGB.tobytes(), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10 << 20)))),
        "too large",
    ),
    "a colour profile that grows": (
        png(*SIZE, 8, 2, RGB.tobytes(), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10 << 20)))),
        "too large|Decompressed",
    ),
    "3,600 megapixels": (png(60_000, 60_000, 8, 2, bytes(60_000)), "more than 50 megapixels"),
    "100 megapixels": (png(10_000, 10_000, 8, 2, bytes(10_000)), "10000 x 10000 .*more than 50 megapixels"),
    "50.01 megapixels": (png(7_072, 7_072, 8, 2, bytes(7_072)), "more than 50 megapixels"),
    "declared, not there": (png(7_000, 7_000, 8, 2, bytes(7_000)), "truncated"),
    "BMP of 2**31 rows": (
        b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 9, -(2**31), 1, 24, 0) + bytes(99),
        "more than 50 megapixels",
    ),
    "long and narrow": (saved(Image.new("L", (1, 60_000)), "PNG"), "too long and narrow"),
}  # fmt: skip
KINDS = {
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "PNG": ("PNG", {}),
    "WebP": ("WEBP", {}),
    "lossless WebP": ("WEBP", {"lossless": True}),
    "BMP": ("BMP", {}),
    "TIFF": ("TIFF", {}),
    "TIFF with deflate": ("TIFF", {"compression": "tiff_deflate"}),
    "TIFF with JPEG": ("TIFF", {"compression": "jpeg"}),
    "TIFF with LZW": ("TIFF", {"compression": "tiff_lzw"}),
}


def decoded(path, content: bytes, resize: int = SIZE[1]):
    """What `decode_all` says of a file of that content."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would make another answer
        (answer,) = decode_all([path], resize)
    return answer


@pytest.mark.parametrize("name", SHOWN)
def test_odd_images_have_the_right_pixels(tmp_path, capfd, name):
    content, expected = SHOWN[name]
    assert np.array_equal(decoded(tmp_path / "a.jpg", content), expected)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_has_a_reason(tmp_path, capfd, name):
    content, words = REFUSED[name]
    reason = decoded(tmp_path / "a.png", content, 1024 if name == "long and narrow" else SIZE[1])
    assert isinstance(reason, str) and len(reason) <= 200
    assert re.search(words, reason), reason
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", KINDS)
def test_files_that_are_cut_off_are_noticed_in_every_format(tmp_path, capfd, name):
    kind, options = KINDS[name]
    whole = saved(NOISE, kind, **options)
    assert isinstance(decoded(tmp_path / "a.tif", whole), np.ndarray)
    for share in (1, 20, len(whole) // 4, len(whole) // 2, len(whole) * 3 // 4, len(whole) - 40):
        assert isinstance(decoded(tmp_path / "a.tif", whole[:share]), str), share
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_does(tmp_path, kind, orientation):
    path = tmp_path / "a.png"
    path.write_bytes(saved(IMAGE, kind, exif=exif(orientation)))
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.array_equal(decode_image(path, SIZE[1]), expected)
    assert expected.shape == ((12, 8, 3) if orientation in (5, 6, 7, 8) else (8, 12, 3))


def test_cmyk_is_shown_in_its_colours(tmp_path):
    red = decoded(tmp_path / "a.jpg", saved(Image.new("CMYK", SIZE, (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 3


def test_scans_are_counted_as_a_decoder_meets_them():
    progressive = saved(NOISE, "JPEG", progressive=True)
    assert count_scans(saved(NOISE, "JPEG")) == 1 and count_scans(progressive) == 10
    # Not those of the thumbnail in front, nor of what follows the end.
    assert count_scans(with_exif(progressive, progressive) + progressive) == 10
    assert count_scans(b"\xff\xd8\xff\xda") == 1
    assert [count_scans(cut) for cut in (b"", b"\xff", b"\xff\xd8", b"\xff\xe1\0", b"\xff\xe1\xff\xff")] == [
        0
    ] * 5


def test_scans_that_would_take_minutes_are_not_decoded(tmp_path):
    assert isinstance(decoded(tmp_path / "a.jpg", scan_bomb(3)), np.ndarray)
    assert re.match("a JPEG of 1006 scans", decoded(tmp_path / "a.jpg", scan_bomb(1000)))


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
def test_what_takes_an_image_s_place_after_the_scan_hangs_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    if kind == "pipe":
        os.mkfifo("a.jpg")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("a.jpg")
    elif kind == "folder":
        (tmp_path / "a.jpg").mkdir()
    else:
        (tmp_path / "a.jpg").symlink_to("/dev/zero")
    answers = []

    def read():
        try:
            list(decode_all([tmp_path / "a.jpg"], 32))
        except DataError as error:
            answers.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert answers and "a.jpg" in answers[0] and "fix:" in answers[0]
