"""What `data check` finds, and which images count as the same."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from helpers import write_folders
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from caltech_hpo.data.check import check
from caltech_hpo.data.dataset import scan
from caltech_hpo.data.duplicates import Group, shared_images
from caltech_hpo.data.loading import load_search_data, load_test_data, named_images


def same_pixels(source: Path, target: Path, **options) -> None:
    """The image of `source` in another file, with other bytes."""
    with Image.open(source) as image:
        image.save(target, compress_level=1, **options)
    assert source.read_bytes() != target.read_bytes()


def test_counts_and_faults(folders):
    index = scan(folders)
    result = check(index)
    assert not (result.unreadable or result.leaks or result.duplicates or result.has_faults)
    (folders / index.validation[0].path).write_bytes(b"not an image")
    result = check(scan(folders))
    assert [(row.name, row.training, row.validation, row.test) for row in result.classes] == [
        ("ant", 3, 3, 3),
        ("Bee", 3, 3, 3),
        ("cat", 3, 3, 3),
    ]
    assert list(result.unreadable) == [f"validation: {index.validation[0].path}"] and result.has_faults


def test_the_same_pixels_in_test_and_training_are_a_leak(folders):
    index = scan(folders)
    same_pixels(folders / index.test[0].path, folders / index.training[0].path)
    same_pixels(folders / index.test[0].path, folders / index.validation[4].path)  # of another class
    result = check(scan(folders))
    names = (
        f"training: {index.training[0].path}", f"validation: {index.validation[4].path}",
        f"test: {index.test[0].path}",
    )  # fmt: skip
    assert result.leaks == (names,) and result.duplicates == () and result.has_faults


def test_the_same_pixels_in_training_and_validation_are_duplicates_and_no_fault(folders):
    index = scan(folders)
    same_pixels(folders / index.training[1].path, folders / index.validation[1].path)
    same_pixels(folders / index.test[1].path, folders / index.test[2].path)  # in one split: nothing is said
    result = check(scan(folders))
    names = (f"training: {index.training[1].path}", f"validation: {index.validation[1].path}")
    assert result.duplicates == (names,) and result.leaks == () and not result.has_faults


def test_the_same_pixels_under_two_classes_of_one_split_contradict_each_other(folders):
    names = [sample.path for sample in scan(folders).training]
    ant = next(name for name in names if name.startswith("ant/"))
    cat = next(name for name in names if name.startswith("cat/"))
    same_pixels(folders / ant, folders / cat)
    result = check(scan(folders))
    assert result.contradictions == ((f"training: {ant}", f"training: {cat}"),)
    assert not result.has_faults and not result.leaks and not result.duplicates


def test_metadata_and_alpha_do_not_make_another_image(folders):
    index = scan(folders)
    with Image.open(folders / index.test[0].path) as image:
        image.putalpha(7)
        image.save(folders / index.training[0].path)
    assert len(check(scan(folders)).leaks) == 1


def test_images_that_look_the_same_are_not(tmp_path):
    """A single pixel that differs by one, in images that are equal when shrunk to a short side of 64."""
    root = write_folders(tmp_path / "images", size=(300, 256))
    index = scan(root)
    with Image.open(root / index.test[0].path) as image:
        pixels = np.array(image)
        pixels[100, 100, 0] += 1
        shrunk = [
            np.asarray(made.resize((75, 64), Image.Resampling.BILINEAR))
            for made in (image, Image.fromarray(pixels))
        ]
    Image.fromarray(pixels).save(root / index.training[0].path)
    assert np.array_equal(*shrunk) and check(scan(root)).leaks == ()


def test_decoded_splits_are_compared_by_their_paths(folders, tmp_path):
    index = scan(folders)
    (folders / index.training[0].path).write_bytes(b"unreadable: what follows moves up")
    same_pixels(folders / index.test[3].path, folders / index.training[5].path)
    index = scan(folders)
    search = load_search_data(index, 32, tmp_path / "cache", skip_unreadable=True)
    test = load_test_data(index, 32, tmp_path / "cache")
    splits = {
        "training": named_images(index.training, search.training_cache),
        "validation": named_images(index.validation, search.validation_cache),
        "test": named_images(index.test, test.test_cache),
    }
    assert [len(images) for images in splits.values()] == [8, 9, 9]
    (group,) = shared_images(splits)
    assert group.members == (("training", index.training[5].path), ("test", index.test[3].path))
    assert group.is_leak and str(group) == f"training: {index.training[5].path} = test: {index.test[3].path}"


IMAGES = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.integers(0, 1)), max_size=8
)


def painted(image):
    height, width, row, corner = image
    pixels = np.full((height, width, 3), row, dtype=np.uint8)
    pixels[0, 0] = corner
    return pixels


@given(st.fixed_dictionaries({"training": IMAGES, "validation": IMAGES, "test": IMAGES}))
def test_the_groups_are_those_of_comparing_all_with_all(made):
    splits = {name: {str(i): painted(image) for i, image in enumerate(some)} for name, some in made.items()}
    expected = defaultdict(set)
    for split, images in splits.items():
        for path, pixels in images.items():
            expected[pixels.shape, pixels.tobytes()].add((split, path))
    wanted = [members for members in expected.values() if len({split for split, _ in members}) > 1]
    found = [set(group.members) for group in shared_images(splits)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, wanted))


def test_a_group_of_hundreds_is_shown_in_short():
    group = Group((("test", "a/0"), *(("training", f"a/{n}") for n in range(300))))
    assert str(group).count(" = ") == 6 and str(group).endswith(" = 295 more") and len(group.names) == 301
