"""The readers of what users bring, given nearly anything: an answer or a reason, soon, in little memory.

CALTECH_HPO_FUZZ=10000 gives each test that many inputs, other ones each time.
"""

from __future__ import annotations

import os
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from odd_images import GREY, RGB, SIZE, exif, png, saved, tiff, with_exif
from PIL import Image

from caltech_hpo.data.decode import MOST_PIXELS, decode_all
from caltech_hpo.data.folders import IMAGE_SUFFIXES, ODD_CHARACTERS, is_class_name, is_image_name
from caltech_hpo.data.lists import read_lists
from caltech_hpo.errors import DataError

ASKED = os.environ.get("CALTECH_HPO_FUZZ", "")
fuzzed = settings(
    max_examples=int(ASKED or 300),
    deadline=None,
    derandomize=not ASKED,
    suppress_health_check=list(HealthCheck),
)
MOST_SECONDS = 5.0  # of processor time for one input
MOST_MEMORY = 2 << 30  # bytes beyond what the process has: 50 megapixels take 0.6 GB at most


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all inputs of a test."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def bounded():
    """Limits the memory of this process, where the system says how much it has."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MOST_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def seeds() -> dict[str, list[bytes]]:
    """Small valid files in each format, in the variants that take other ways through a decoder."""
    image, grey = Image.fromarray(RGB), Image.fromarray(GREY)
    several = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    words = (GREY.astype(np.uint16) * 257).astype(">u2").tobytes()
    compressions = ["tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg"]
    return {
        "JPEG": [
            saved(image, "JPEG"), saved(image, "JPEG", progressive=True), saved(grey, "JPEG", exif=exif(6)),
            saved(image.convert("CMYK"), "JPEG"), saved(image, "JPEG", icc_profile=bytes(300), xmp=xmp),
            saved(image, "MPO", **several), saved(image, "JPEG", restart_marker_blocks=1),
        ],
        "PNG": [
            saved(image, "PNG", exif=exif(3)), saved(image.quantize(16), "PNG", transparency=3),
            saved(image.convert("LA"), "PNG"), saved(image.convert("1"), "PNG"), png(*SIZE, 16, 0, words),
            saved(image, "PNG", **several), saved(image, "PNG", icc_profile=bytes(300)),
        ],
        "WEBP": [
            saved(image, "WEBP", exif=exif(8)), saved(image, "WEBP", lossless=True),
            saved(image, "WEBP", **several), saved(image, "WEBP", xmp=xmp),
            saved(image.convert("RGBA"), "WEBP"),
        ],
        "BMP": [
            saved(image, "BMP"), saved(grey, "BMP"), saved(image.quantize(16), "BMP"),
            saved(image.convert("1"), "BMP"), saved(image.convert("RGBA"), "BMP"),
        ],
        "TIFF": [
            saved(image, "TIFF", exif=exif(5)), saved(image, "TIFF", **several),
            saved(grey, "TIFF", big_tiff=True), saved(image.convert("CMYK"), "TIFF"),
            tiff(*SIZE, 16, False, words),
            saved(image.convert("LAB"), "TIFF"), saved(image.convert("1"), "TIFF", compression="group4"),
            saved(image.convert("1"), "TIFF", compression="group3"), saved(image.quantize(16), "TIFF"),
            *(saved(image, "TIFF", compression=name) for name in compressions),
        ],
    }  # fmt: skip


SEEDS = seeds()
EVERY = [content for variants in SEEDS.values() for content in variants]
MAGIC = {
    "JPEG": b"\xff\xd8\xff",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "WEBP": b"RIFF\xff\xff\0\0WEBPVP8",
    "BMP": b"BM",
    "TIFF": b"II*\0",
}
TELLING = [
    b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\0\0\0\0", b"\xff\xff", b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x80\0\0\0",
    b"\xff\xda", b"\xff\xd9", b"\xff\xc2", b"\xff\xe1\0\2",
    struct.pack("<I", 7000), struct.pack(">I", 7000), struct.pack("<H", 7000), struct.pack(">H", 7000),
]  # fmt: skip


@st.composite
def mutated(draw, sources=EVERY):
    """A valid file with a few faults: bits flipped, bytes replaced, parts cut out, repeated, or another's."""
    content = bytearray(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(content)) | st.integers(0, min(80, len(content))))
        length = draw(st.integers(0, 40) | st.integers(0, len(content)))
        match draw(st.sampled_from(["bit", "bytes", "telling", "cut", "end", "repeat", "splice", "insert"])):
            case "bit" if place < len(content):
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "bytes":
                new = draw(st.binary(max_size=8))
                content[place : place + len(new)] = new
            case "telling":
                new = draw(st.sampled_from(TELLING))
                content[place : place + len(new)] = new
            case "cut":
                del content[place : place + length]
            case "end":
                del content[place:]
            case "repeat":
                content[place:place] = content[place : place + length] * draw(st.integers(1, 20))
            case "splice":
                content[place:] = draw(st.sampled_from(EVERY))[draw(st.integers(0, 300)) :]
            case "insert":
                content[place:place] = draw(st.binary(max_size=40))
    made = bytes(content)
    return with_checksums(made) if draw(st.booleans()) else made


def with_checksums(content: bytes) -> bytes:
    """A PNG file with the checksums that its chunks should have, so that faults reach further than those."""
    made, place = bytearray(content), 8
    while content.startswith(MAGIC["PNG"]) and place + 12 <= len(made):
        end = place + 8 + int.from_bytes(made[place : place + 4])
        if end + 4 > len(made):
            break
        made[end : end + 4] = struct.pack(">I", zlib.crc32(made[place + 4 : end]))
        place = end + 4
    return bytes(made)


@st.composite
def with_magic(draw):
    """Anything at all behind the beginning of a format."""
    return draw(st.sampled_from(list(MAGIC.values()))) + draw(st.binary(max_size=300))


@st.composite
def with_odd_exif(draw):
    """A JPEG whose metadata are faulty."""
    whole = exif(6).tobytes()[6:]
    content = bytearray(whole + draw(st.binary(max_size=60)))
    for _ in range(draw(st.integers(1, 5))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return with_exif(saved(Image.fromarray(RGB), "JPEG"), bytes(content))


# Found by 50,000 inputs: its chunk says that it has 4 GB, which reading from a file set aside.
FOUND = re.sub(rb"\0(?=...IDAT)", b"\xff", saved(Image.fromarray(GREY), "PNG"), flags=re.DOTALL)


@fuzzed
@example(content=FOUND)
@given(content=mutated() | mutated() | mutated() | with_magic() | with_odd_exif() | st.binary(max_size=200))
def test_any_file_is_an_image_or_has_a_reason(folder, bounded, content):
    path = folder / "a.jpg"
    path.write_bytes(content)
    begin = time.process_time()
    (answer,) = decode_all([path], 32)
    assert time.process_time() - begin < MOST_SECONDS
    event("a reason" if isinstance(answer, str) else "an image")  # --hypothesis-show-statistics counts them
    if isinstance(answer, str):
        assert answer.isprintable() and 0 < len(answer) <= 200
    else:
        assert answer.dtype == np.uint8 and answer.shape[2:] == (3,) and min(answer.shape[:2]) == 32
        assert answer.size <= 3 * MOST_PIXELS


@pytest.mark.parametrize("kind", SEEDS)
def test_the_files_that_are_changed_are_images(folder, kind):
    for content in SEEDS[kind]:
        (folder / "a.jpg").write_bytes(content)
        assert isinstance(next(decode_all([folder / "a.jpg"], 32)), np.ndarray)
        assert with_checksums(content) == content


KNOWN = [f"{name}/image {n}.png" for name in ("ant", "Bee", "naïve class", " cat ") for n in range(4)]
ENDS = ["\n", "\r\n", "\r", "\n\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\ufeff", "\0", " \n\t"]
LINES = st.one_of(
    st.sampled_from(KNOWN),
    st.sampled_from(KNOWN).map(lambda name: f" ./{name.replace('/', '//')}\t"),
    st.sampled_from(
        ["../x/y.png", "/etc/passwd", "a\\b.png", "BACKGROUND_Google/x.jpg", "ant", "ant/", "//", ".", ""]
    ),
    st.text(max_size=30),
)
TEXTS = st.lists(st.tuples(LINES, st.sampled_from(ENDS)), max_size=12).map(
    lambda lines: "".join(a + b for a, b in lines)
)
CONTENTS = st.one_of(
    TEXTS.map(str.encode),
    TEXTS.map(lambda text: b"\xef\xbb\xbf" + text.encode()),
    st.tuples(TEXTS, st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-7"])).map(
        lambda made: made[0].encode(made[1])
    ),
    st.tuples(TEXTS, st.binary(max_size=20)).map(lambda made: made[0].encode() + made[1]),
    st.binary(max_size=400),
)


@fuzzed
@given(train=CONTENTS, test=CONTENTS)
def test_any_lists_are_read_or_have_their_faults_named(folder, train, test):
    paths = folder / "train.txt", folder / "test.txt"
    for path, content in zip(paths, (train, test), strict=True):
        path.write_bytes(content)
    begin = time.process_time()
    try:
        read = read_lists(*paths, folder, set(KNOWN))
    except DataError as error:
        message = str(error)
        assert message.replace("\n", "").isprintable() and len(message) < 10_000
        assert re.search(r"(train|test)\.txt(:\d+)?: ", message) and "mend the lists" in error.fix
    else:
        named = [*read[0], *read[1]]
        assert set(named) <= set(KNOWN) and len(set(named)) == len(named)
    assert time.process_time() - begin < MOST_SECONDS


NAMES = st.text(
    st.characters(exclude_categories=tuple(ODD_CHARACTERS), exclude_characters="/\0"), min_size=1, max_size=20
)
CLASSES = NAMES.filter(lambda name: name not in (".", "..") and is_class_name(name))
FILES = st.tuples(NAMES, st.sampled_from(sorted(IMAGE_SUFFIXES))).map("".join).filter(is_image_name)


@fuzzed
@given(
    named=st.lists(st.tuples(CLASSES, FILES).map("/".join), min_size=2, max_size=12, unique=True),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    data=st.data(),
)
def test_every_name_that_a_folder_may_hold_can_be_listed(folder, named, end, data):
    share = data.draw(st.integers(1, len(named) - 1))
    paths = folder / "train.txt", folder / "test.txt"
    for path, names in zip(paths, (named[:share], named[share:]), strict=True):
        path.write_bytes(end.join(names).encode("utf-8-sig"))
    assert read_lists(*paths, folder, set(named)) == (named[:share], named[share:])
