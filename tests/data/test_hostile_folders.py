"""Links, pipes, devices, and names: what a data folder may hold, what is ignored, and what is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_folders, write_image

from caltech_hpo.data import lists
from caltech_hpo.data.cache import build_cache, open_cache
from caltech_hpo.data.dataset import scan
from caltech_hpo.data.files import Faults, shown
from caltech_hpo.errors import DataError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")


@pytest.fixture
def outside(tmp_path):
    """Images that are not in the data folder."""
    return write_folders(tmp_path / "outside", classes=("dog",))


def refusal(root):
    """What the scan says, its lines without the first and the fix."""
    with pytest.raises(DataError) as raised:
        scan(root)
    return raised.value.message.splitlines()[1:], raised.value.fix


def test_everything_that_is_no_image_of_the_folder_is_named_at_once(folders, outside, monkeypatch):
    ant = folders / "ant"
    (ant / "loop.png").symlink_to("loop.png")
    (ant / "gone.jpg").symlink_to("nowhere.jpg")
    (ant / "out.png").symlink_to(outside / "dog" / "image_000.png")
    (ant / "up.png").symlink_to("../../outside/dog/image_000.png")
    (ant / "zero.bmp").symlink_to("/dev/zero")
    (ant / "folder.tif").symlink_to(outside)
    os.mkfifo(ant / "pipe.jpeg")
    (ant / "to_pipe.webp").symlink_to("pipe.jpeg")
    (folders / "dog").symlink_to(outside / "dog")
    (folders / "Elk").symlink_to("not-mounted")
    monkeypatch.chdir(ant)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    found, fix = refusal(folders)
    assert found == [
        "  Elk leads nowhere: No such file or directory",
        f"  dog leads out of the folder, to {outside}/dog",
        f"  ant/folder.tif leads out of the folder, to {outside}",
        "  ant/gone.jpg leads nowhere: No such file or directory",
        "  ant/loop.png leads nowhere: Too many levels of symbolic links",
        f"  ant/out.png leads out of the folder, to {outside}/dog/image_000.png",
        "  ant/pipe.jpeg is a named pipe",
        "  ant/socket.png is a socket",
        "  ant/to_pipe.webp leads to a named pipe",
        f"  ant/up.png leads out of the folder, to {outside}/dog/image_000.png",
        "  and 1 more",  # zero.bmp
    ]
    assert "cp -rL" in fix and ".shared" in fix


def test_a_pipe_alone_is_to_be_removed(folders):
    os.mkfifo(folders / "ant" / "pipe.png")
    assert refusal(folders) == (["  ant/pipe.png is a named pipe"], "remove them")


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="needs root")
def test_a_device_is_named(folders):
    try:
        os.mknod(folders / "ant" / "device.png", 0o20600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no devices can be made here")
    assert refusal(folders)[0] == ["  ant/device.png is a device"]


def test_links_that_stay_below_the_folder_are_images(tmp_path, folders, outside):
    """Both ways out that the refusal names."""
    (folders / "ant" / "more.png").symlink_to(outside / "dog" / "image_000.png")
    (folders / "dog").symlink_to(outside / "dog")
    assert len(refusal(folders)[0]) == 2

    (folders / "ant" / "more.png").unlink()
    (folders / "dog").unlink()
    outside.rename(folders / ".shared")
    (folders / "ant" / "more.png").symlink_to("again.png")
    (folders / "ant" / "again.png").symlink_to("../.shared/dog/image_000.png")
    (folders / "dog").symlink_to(folders / ".shared" / "dog")
    index = scan(folders)
    assert index.classes == ("ant", "Bee", "cat", "dog")
    everything = index.training + index.validation + index.test
    assert len(everything) == 38 and "ant/more.png" in {sample.path for sample in everything}
    assert len(open_cache(build_cache(index.root, everything, 32, tmp_path / "c", label="x"))) == 38

    subprocess.run(["cp", "-rL", folders, tmp_path / "copy"], check=True)
    copy = scan(tmp_path / "copy")
    assert copy.fingerprint == index.fingerprint
    assert not any((copy.root / sample.path).is_symlink() for sample in everything)


def test_the_folder_given_may_be_a_link_itself(tmp_path, folders, monkeypatch):
    (folders / "ant" / "more.png").symlink_to("image_000.png")
    (tmp_path / "link").symlink_to(folders)
    (tmp_path / "chain").symlink_to("link")
    assert scan(tmp_path / "chain").fingerprint == scan(folders).fingerprint
    monkeypatch.chdir(folders)
    assert scan(Path()).fingerprint == scan(folders).fingerprint


def test_a_nested_folder_that_is_a_link_out_is_refused(tmp_path, folders):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "101_ObjectCategories").symlink_to(folders)
    found, _ = refusal(tmp_path / "data")
    assert found == [f"  101_ObjectCategories leads out of the folder, to {folders}"]


def test_a_link_to_the_folder_above_ends(folders):
    (folders / "again").symlink_to(".")
    with pytest.raises(DataError, match="without an image: 'again'"):
        scan(folders)


def test_files_beside_the_class_folders_are_no_images_wherever_they_lead(folders, outside):
    before = scan(folders)
    (folders / "README").symlink_to(outside / "dog" / "image_000.png")
    (folders / "null").symlink_to("/dev/null")
    os.mkfifo(folders / "pipe.jpg")
    assert scan(folders) == before


IGNORED = [
    ".ipynb_checkpoints", "._image_000.png", "._ant", ".DS_Store", "Thumbs.db", "thumbs.db", "desktop.ini",
    "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information",
]  # fmt: skip


@pytest.mark.parametrize("name", [*IGNORED, "BACKGROUND_Google"])
def test_folders_of_programs_are_no_classes(folders, name):
    before = scan(folders)
    write_image(folders / name / "image_000.png", 1)
    (folders / name / "deeper").mkdir()
    write_image(folders / "ant" / name / "image_000.png", 1)
    assert scan(folders) == before


@pytest.mark.parametrize("name", IGNORED)
def test_files_of_programs_are_no_images(folders, name):
    before = scan(folders)
    (folders / name).write_bytes(b"x")
    (folders / "ant" / name).write_bytes(b"x")
    assert scan(folders) == before


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "._image_009.png", ".hidden.jpg"])
def test_hidden_links_and_pipes_are_ignored_too(folders, outside, name):
    before = scan(folders)
    (folders / name).symlink_to(outside / "dog")
    (folders / "Bee" / name).symlink_to("/dev/zero")
    os.mkfifo(folders / "ant" / name)
    assert scan(folders) == before


@pytest.mark.parametrize("name", ["a\nb.png", "a\rb.png", "a\x1b[2Jb.png", "a\u2028b.png", "a\x85b.png"])
def test_names_that_no_list_could_hold_are_refused(folders, name):
    write_image(folders / "ant" / "image_009.png", 1).rename(folders / "ant" / name)
    (line,), fix = refusal(folders)
    assert line.isprintable() and line.endswith("has a name that is not UTF-8 or has control characters")
    assert fix == "rename the files"


def test_a_name_that_is_not_utf_8_is_refused(folders):
    with open(os.fsencode(folders / "ant") + b"/caf\xe9.png", "wb") as file:  # noqa: PTH123
        file.write(b"x")
    (line,), _ = refusal(folders)
    assert "caf\\udce9.png" in line


ODD_BUT_FINE = [
    "naïve.png",
    " leading.png",
    "ideo\u3000graphic.png",
    "\U0001f468\u200d\U0001f467.png",
    "a\xa0b.png",
]


@pytest.mark.parametrize("listed", [False, True])
def test_names_in_any_language_are_images(folders, listed):
    for number, name in enumerate(ODD_BUT_FINE):
        write_image(folders / "ant" / name, number)
        write_image(folders / " wide\xa0class" / name, number)
    by_rule = scan(folders)
    if listed:
        train = [sample.path for sample in by_rule.training + by_rule.validation]
        (folders / "train.txt").write_text("\r\n".join(train), encoding="utf-8", newline="")
        (folders / "test.txt").write_text("\n".join(s.path for s in by_rule.test), encoding="utf-8")
        index = scan(folders)
        assert [sample.path for sample in index.training] == train[0::2]
        assert index.test == by_rule.test and index.unlisted == 0
    else:
        paths = {sample.path for sample in by_rule.training + by_rule.validation + by_rule.test}
        assert len(paths) == 27 + 10


@pytest.mark.parametrize("kind", ["pipe", "link out", "dangling", "device"])
def test_a_list_must_be_a_file_of_the_folder(folders, outside, kind):
    secret = outside / "passwords"
    secret.write_text("root:x:0:0")
    (folders / "test.txt").write_text("ant/image_000.png")
    train = folders / "train.txt"
    if kind == "pipe":
        os.mkfifo(train)
    else:
        train.symlink_to({"link out": secret, "dangling": "gone", "device": "/dev/zero"}[kind])
    with pytest.raises(DataError, match=r"train\.txt (is|leads) ") as raised:
        scan(folders)
    assert "root:x:" not in str(raised.value) and raised.value.fix


def test_a_list_may_be_a_link_that_stays_below_the_folder(folders):
    index = scan(folders)
    (folders / ".lists").mkdir()
    for name, samples in (("train.txt", index.training + index.validation), ("test.txt", index.test)):
        (folders / ".lists" / name).write_text("\n".join(sample.path for sample in samples))
        (folders / name).symlink_to(folders / ".lists" / name)
    assert scan(folders).unlisted == 0 and "lists" in scan(folders).split_source


def test_a_list_that_became_a_pipe_hangs_nothing(folders, tmp_path):
    os.mkfifo(tmp_path / "train.txt")
    (tmp_path / "test.txt").write_text("")
    with pytest.raises(DataError, match="is a named pipe"):
        lists.read_lists(tmp_path / "train.txt", tmp_path / "test.txt", folders, {"ant/image_000.png"})


def test_a_list_is_read_up_to_its_limit(folders, monkeypatch):
    (folders / "train.txt").write_text("ant/image_000.png\n" * 100)
    (folders / "test.txt").write_text("ant/image_001.png\n")
    monkeypatch.setattr(lists, "MOST_BYTES", 1000)
    with pytest.raises(DataError, match=r"train\.txt: larger than"):
        scan(folders)


def test_a_list_cannot_write_to_the_terminal_nor_flood_it(folders):
    lines = [f"\x1b]0;mine\x07 {n} \u202e" + "x" * 100_000 for n in range(50)]
    (folders / "train.txt").write_text("\n".join(lines))
    (folders / "test.txt").write_text("ant/image_001.png\n")
    with pytest.raises(DataError) as raised:
        scan(folders)
    message = str(raised.value)
    assert message.replace("\n", "").isprintable() and len(message) < 10_000
    assert "50 error(s)" in message and "and 40 more" in message and r"\x1b]0;mine\x07" in message


def test_faults_are_counted_and_the_first_shown():
    faults = Faults()
    for number in range(12):
        faults.add(f"fault {number}")
    assert str(faults).splitlines()[0::9] == ["  fault 0", "  fault 9"]
    assert str(faults).endswith("\n  and 2 more") and faults.count == 12
    assert shown("x" * 1000) == "x" * 297 + "..." and shown("\t" * 300, 10) == r"\t\t\t\..."
    assert shown("né\t") == r"né\t" and shown("\ud800") == r"\ud800"
