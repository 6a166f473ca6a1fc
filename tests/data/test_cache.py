"""The pixel cache: right pixels, whole or absent, faults named."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from filelock import FileLock
from helpers import write_folders, write_image
from PIL import Image

from caltech_hpo.data import cache, decode
from caltech_hpo.data.cache import build_cache, open_cache
from caltech_hpo.data.dataset import Sample, scan
from caltech_hpo.data.decode import decode_image
from caltech_hpo.data.loading import load_search_data, load_test_data, thin
from caltech_hpo.errors import DataError, UnreadableImagesError


def build(index, folder, **options):
    return build_cache(index.root, index.training, 32, folder, label="training", **options)


def test_the_cache_holds_what_decoding_gives(folders, tmp_path):
    index = scan(folders)
    data = open_cache(build(index, tmp_path / "cache"))
    assert data.labels.tolist() == [sample.label for sample in index.training]
    for image, sample in zip(data.images, index.training, strict=True):
        assert np.array_equal(image, decode_image(folders / sample.path, 32))
    both = data + data
    assert len(both) == 2 * len(data) and both.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("size", "shape"),
    [((48, 40), (32, 38, 3)), ((40, 48), (38, 32, 3)), ((200, 20), (32, 320, 3)), ((9, 9), (32, 32, 3))],
)
def test_the_short_side_is_resized_and_the_aspect_kept(tmp_path, size, shape):
    assert decode_image(write_image(tmp_path / "a.png", 0, size=size), 32).shape == shape


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = write_image(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), 0, mode=mode)
    pixels = decode_image(path, 32)
    assert pixels.shape[2] == 3 and pixels.dtype == np.uint8
    if mode == "L":
        assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (32, 1, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to display
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert decode_image(tmp_path / "a.jpg", 32).shape == (64, 32, 3)


def test_content_decides_the_format_and_others_are_refused(tmp_path):
    write_image(tmp_path / "a.png", 0)
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert decode_image(tmp_path / "a.jpg", 32).shape == (32, 38, 3)
    (tmp_path / "evil.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(Exception, match="another format than JPEG, PNG, WEBP, BMP, TIFF"):
        decode_image(tmp_path / "evil.jpg", 32)


def test_a_second_build_reads_nothing(folders, tmp_path, monkeypatch):
    first = build(scan(folders), tmp_path / "cache")
    monkeypatch.setattr(decode, "decode_image", None)
    assert build(scan(folders), tmp_path / "cache") == first


def test_a_changed_file_or_size_is_another_cache(folders, tmp_path):
    index = scan(folders)
    first = build(index, tmp_path / "cache")
    assert first != build_cache(index.root, index.training, 40, tmp_path / "cache", label="training")
    write_image(folders / index.training[0].path, 5, size=(50, 50))
    assert first != build(scan(folders), tmp_path / "cache")


def test_unreadable_images_are_named_or_skipped(folders, tmp_path):
    index = scan(folders)
    bad = index.training[1].path
    (folders / bad).write_bytes((folders / bad).read_bytes()[:200])
    for _ in range(2):  # also when the cache is there already
        with pytest.raises(UnreadableImagesError, match=f"1 unreadable image.*\n.*{bad}"):
            build(index, tmp_path / "cache")
    data = open_cache(build(index, tmp_path / "cache", skip_unreadable=True))
    assert len(data) == len(index.training) - 1
    assert index.training[0].label == data.labels[0]


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_truncated_cache_is_refused_and_made_again(folders, tmp_path, keep):
    path = build(scan(folders), tmp_path / "cache")
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(DataError, match="damaged"):
        open_cache(path)
    assert build(scan(folders), tmp_path / "cache").read_bytes() == whole


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pixels = decode_image(tmp_path / "ramp.png", 64)
    assert np.array_equal(pixels[..., 0], ramp // 257)


def test_float_and_oversized_images_are_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="save the image with 8 or 16 bits"):
        decode_image(tmp_path / "float.tif", 64)
    Image.new("L", (1, 3000)).save(tmp_path / "thread.png")  # 768,000 pixels long at short side 256
    with pytest.raises(ValueError, match="too long and narrow"):
        decode_image(tmp_path / "thread.png", 256)


def test_the_systems_faults_are_not_remembered_as_the_images(folders, tmp_path, monkeypatch):
    def denied(path, resize):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(decode, "decode_image", denied)
        with pytest.raises(DataError, match="Permission denied"):
            build(scan(folders), tmp_path / "cache", skip_unreadable=True)
    assert len(open_cache(build(scan(folders), tmp_path / "cache"))) == 9


def test_folders_with_equal_names_sizes_and_times_have_caches_of_their_own(tmp_path):
    paths = []
    for name, value in (("a", 10), ("b", 200)):
        for label in ("x", "y"):
            for number in range(4):
                path = tmp_path / name / label / f"{number}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (value,) * 3).save(path)
                os.utime(path, ns=(0, 0))
        paths.append(build(scan(tmp_path / name), tmp_path / "cache"))
    assert [int(open_cache(path).images[0].max()) for path in paths] == [10, 200]


def test_a_subset_without_a_class_may_leave_images_out(tmp_path):
    index = scan(write_folders(tmp_path / "images", classes=("a", "b", "c", "d"), images=9))
    kept = thin(index.training, 3)
    assert len({sample.label for sample in kept}) == 3
    bad = next(sample for sample in thin(index.validation, 3))
    (index.root / bad.path).write_bytes(b"no image")
    data = load_search_data(scan(index.root), 32, tmp_path / "cache", subset=3, skip_unreadable=True)
    assert len(data.open_training()) == 3 and len(data.open_validation()) == 2


def test_what_is_unreadable_is_named_of_both_splits_at_once(folders, tmp_path):
    index = scan(folders)
    broken = [index.training[0].path, index.validation[0].path]
    for path in broken:
        (index.root / path).write_bytes(b"no image")
    with pytest.raises(UnreadableImagesError) as raised:
        load_search_data(scan(folders), 32, tmp_path)
    assert all(path in str(raised.value) for path in broken) and str(raised.value).count("fix:") == 1


def test_a_class_whose_training_images_are_all_unreadable_is_refused(folders, tmp_path):
    index = scan(folders)
    for sample in index.training:
        if sample.label == 1:
            (folders / sample.path).write_bytes(b"no image")
    with pytest.raises(DataError, match="no readable training image of Bee"):
        load_search_data(scan(folders), 32, tmp_path, skip_unreadable=True)


def test_a_failed_build_leaves_nothing(folders, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full"):
        build(scan(folders), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_two_processes_may_race(folders, tmp_path):
    code = (
        "import sys; from pathlib import Path; from caltech_hpo.data.dataset import scan; "
        "from caltech_hpo.data.cache import build_cache, open_cache; index = scan(Path(sys.argv[1])); "
        "path = build_cache(index.root, index.training, 32, Path(sys.argv[2]), label='t'); "
        "print(path, len(open_cache(path)))"
    )
    command = [sys.executable, "-c", code, str(folders), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {process.communicate(timeout=60)[0] for process in running}
    assert len(answers) == 1 and answers.pop().strip().endswith(" 9")


def test_whoever_waits_for_another_program_hears_why(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WAIT", 0.05)
    index = scan(folders)
    path = tmp_path / f"{cache.cache_key(folders, index.training, 32)}.lock"
    other = FileLock(path)
    other.acquire()
    said = []

    def progress(*what):
        said.append(what)
        if len(said) == 2:
            other.release()

    build(index, tmp_path, progress=progress)
    assert said[:2] == [("waiting for another program that decodes these training images", 0, 9)] * 2
    assert said[2] == ("decoding training images", 1, 9)


def test_splits_have_files_of_their_own(folders, tmp_path):
    index = scan(folders)
    search = load_search_data(index, 32, tmp_path)
    test = load_test_data(index, 32, tmp_path)
    assert len({search.training_cache, search.validation_cache, test.test_cache}) == 3
    assert len(search.open_training()) == len(search.open_validation()) == len(test.open_test()) == 9
    assert search.fingerprint == test.fingerprint == index.fingerprint
    small = load_search_data(index, 32, tmp_path, subset=3)
    assert len(small.open_training()) == 3 and small.fingerprint != search.fingerprint


def test_thinning_spreads_over_the_classes():
    samples = [Sample(f"{i // 100}/{i}", i // 100) for i in range(1000)]
    assert {sample.label for sample in thin(samples, 50)} == set(range(10))
    assert len(thin(samples, 300)) == 300
    assert thin(samples[:5], 50) == tuple(samples[:5])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_only_cores_that_the_process_may_use_count():
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert decode.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, mine)
    assert decode.usable_cores() == len(mine)
