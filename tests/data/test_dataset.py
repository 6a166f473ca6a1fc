"""Classes, the split rule, split files, and what is refused."""

from __future__ import annotations

import shutil

import pytest
from helpers import write_folders, write_image
from hypothesis import given
from hypothesis import strategies as st

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.folders import BACKGROUND
from caltech_hpo.data.lists import list_entries, path_problem
from caltech_hpo.errors import DataError


def published(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.split("/")[0] != BACKGROUND]


def test_rule_and_lists_give_the_published_split(caltech101):
    by_lists = scan(caltech101)
    by_rule = scan(caltech101 / "101_ObjectCategories")
    train, test = published(caltech101 / "train.txt"), published(caltech101 / "test.txt")
    assert len(train) + len(test) == 8_677
    assert len(by_rule.classes) == 101
    assert (by_rule.classes[0], by_rule.classes[-1]) == ("accordion", "yin_yang")
    for index in (by_lists, by_rule):
        assert [sample.path for sample in index.training] == train[0::2]
        assert [sample.path for sample in index.validation] == train[1::2]
        assert [sample.path for sample in index.test] == test
    assert by_lists.fingerprint == by_rule.fingerprint
    assert "lists" in by_lists.split_source and "rule" in by_rule.split_source


def test_any_class_folders_split_by_rule(folders):
    write_image(folders / "BACKGROUND_Google" / "a.png", 1)
    write_image(folders / ".ipynb_checkpoints" / "a.png", 1)
    (folders / "ant" / "notes.txt").write_text("no image")
    (folders / "ant" / "._image_000.png").write_text("no image")
    index = scan(folders)
    assert index.classes == ("ant", "Bee", "cat")  # case-insensitive
    everything = [f"{name}/image_{n:03d}.png" for name in index.classes for n in range(9)]
    assert [sample.path for sample in index.test] == everything[0::3]
    train = [path for i, path in enumerate(everything) if i % 3]
    assert [sample.path for sample in index.training] == train[0::2]
    assert [sample.path for sample in index.validation] == train[1::2]
    assert {sample.label for sample in index.training} == {0, 1, 2}


def test_the_unpacked_archive_is_found_below_the_folder(tmp_path):
    write_folders(tmp_path / "caltech-101" / "101_ObjectCategories")
    assert scan(tmp_path).root == tmp_path / "caltech-101" / "101_ObjectCategories"


def test_a_copy_has_the_same_fingerprint_and_a_change_another(folders, tmp_path):
    copy = shutil.copytree(folders, tmp_path / "copy")
    assert scan(copy).fingerprint == scan(folders).fingerprint
    write_image(copy / "ant" / "image_000.png", 77, size=(64, 64))
    assert scan(copy).fingerprint != scan(folders).fingerprint


def lists(folders, train, test):
    (folders / "train.txt").write_text("\n".join(train) + "\n")
    (folders / "test.txt").write_text("\n".join(test) + "\n")


TRAIN = [f"{name}/image_{n:03d}.png" for name in ("ant", "Bee", "cat") for n in range(4)]
TEST = [f"{name}/image_{n:03d}.png" for name in ("ant", "Bee", "cat") for n in range(4, 6)]


def test_lists_decide_and_count_what_they_leave_out(folders):
    lists(folders, ["", *TRAIN, "BACKGROUND_Google/x.jpg"], TEST)
    index = scan(folders)
    assert [sample.path for sample in index.training] == TRAIN[0::2]
    assert [sample.path for sample in index.test] == TEST
    assert index.unlisted == 27 - 12 - 6


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (
            [*TRAIN, "ant/absent.png"],
            TEST,
            r"train\.txt:13: ant/absent\.png names an image that is not there",
        ),
        ([*TRAIN, "../secret.png"], TEST, r"train\.txt:13: \.\./secret\.png leaves the image folder"),
        ([*TRAIN, "/etc/passwd"], TEST, "leaves the image folder"),
        ([*TRAIN, "ant/../cat/image_008.png"], TEST, "leaves the image folder"),
        ([*TRAIN, "image_000.png"], TEST, "is not of the form class/file"),
        ([*TRAIN, "a\\b.png"], TEST, "backslash"),
        ([*TRAIN, TRAIN[0]], TEST, "is listed twice"),
        (TRAIN, [*TEST, TRAIN[0]], r"ant/image_000\.png is also in train\.txt"),
        (TRAIN, [], "test split is empty"),
        (TRAIN[:8], TEST, "without a training image: cat"),
    ],
)
def test_faulty_lists(folders, train, test, words):
    lists(folders, train, test)
    with pytest.raises(DataError, match=words):
        scan(folders)


def test_lists_from_other_editors(folders):
    lists(folders, [f"./{name}  " for name in TRAIN], TEST)
    text = (folders / "train.txt").read_text().replace("\n", "\r\n")
    (folders / "train.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [sample.path for sample in scan(folders).training] == TRAIN[0::2]


def test_one_list_alone_is_an_error(folders):
    (folders / "train.txt").write_text("\n".join(TRAIN))
    with pytest.raises(DataError, match=r"there is no test\.txt beside it"):
        scan(folders)


def test_a_list_that_is_no_text(folders):
    lists(folders, TRAIN, TEST)
    (folders / "train.txt").write_bytes(b"\xff\xfe\x00ant")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        scan(folders)


def test_faulty_folders(tmp_path, folders):
    with pytest.raises(DataError, match="no such folder"):
        scan(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        scan(tmp_path / "bare")
    (folders / "dog").mkdir()
    with pytest.raises(DataError, match="without an image: 'dog'"):
        scan(folders)
    with pytest.raises(DataError, match="only one class"):
        scan(write_folders(tmp_path / "one", classes=("ant",)))


@given(st.lists(st.text(st.characters(exclude_characters="\n\r"), max_size=40), max_size=30))
def test_list_parsing_never_fails_and_keeps_line_numbers(lines):
    for number, name in list_entries("\r\n".join(lines)):
        assert lines[number - 1].strip() == name != ""
        path_problem(name)


@given(st.text(max_size=60))
def test_a_path_without_a_problem_stays_in_its_class_folder(name):
    if not path_problem(name):
        parts = [part for part in name.split("/") if part not in ("", ".")]
        assert len(parts) == 2 and ".." not in parts and not name.startswith("/")
