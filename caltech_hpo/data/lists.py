"""Split files: which images are for training and which for the test, one "class/file" a line."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from caltech_hpo.data.files import Faults, read_regular, shown
from caltech_hpo.data.folders import BACKGROUND, follow
from caltech_hpo.errors import DataError

MOST_BYTES = 64 << 20  # half a million paths of 100 characters


def find_lists(root: Path, images: Path) -> tuple[Path, Path] | None:
    """train.txt and test.txt in `root` or beside the class folders, or None.

    Raises DataError for one alone, and for what is no file in the data folder.
    """
    base = Path(os.path.realpath(root))
    for folder in dict.fromkeys((root, images)):
        train, test = folder / "train.txt", folder / "test.txt"
        there = [path for path in (train, test) if _is_list(path, base)]
        if len(there) == 2:
            return train, test
        if there:
            present, absent = (train, test) if there == [train] else (test, train)
            raise DataError(
                f"{shown(present)}: there is no {absent.name} beside it",
                f"add {absent.name}, or remove {present.name} to split by rule",
            )
    return None


def _is_list(path: Path, base: Path) -> bool:
    if not os.path.lexists(path):
        return False
    mode, why = follow(path, base)
    if why and not stat.S_ISDIR(mode):
        raise DataError(f"{shown(path)} {why}", "put the list itself there, or remove it to split by rule")
    return stat.S_ISREG(mode)


def read_lists(
    train_list: Path, test_list: Path, images: Path, known: Collection[str]
) -> tuple[list[str], list[str]]:
    """The images that the two lists name, in their order; `known` are those that are there.

    Raises DataError naming the list and line of a missing file, a path that leaves the folder, a
    path listed twice, or an image in both lists.
    """
    faults = Faults()
    train = _read_list(train_list, known, faults)
    test = _read_list(test_list, known, faults)
    for path in sorted(set(train) & set(test)):
        faults.add(f"{shown(test_list)}: {shown(path)} is also in {train_list.name}")
    if faults.count:
        raise DataError(
            f"{faults.count} error(s) in the split files:\n{faults}",
            f"mend the lists; each line is class/file below {shown(images)}",
        )
    return train, test


def _read_list(path: Path, known: Collection[str], faults: Faults) -> list[str]:
    try:
        content = read_regular(path, MOST_BYTES)
        text = (content or b"").decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        faults.add(f"{shown(path)}: cannot be read as UTF-8 text: {shown(error)}")
        return []
    if content is None:
        faults.add(f"{shown(path)}: larger than {MOST_BYTES >> 20} MiB")
        return []
    names: dict[str, None] = {}
    for number, line in list_entries(text, known):
        name, problem = line, ""
        if line not in known:
            problem = path_problem(line)
            name = line if problem else str(PurePosixPath(line))  # "./a/b" is "a/b"
            if not problem and name not in known:
                problem = "names an image that is not there"
        if not problem and name in names:
            problem = "is listed twice"
        if problem:
            faults.add(f"{shown(path)}:{number}: {shown(line)} {problem}")
        else:
            names[name] = None
    return list(names)


def list_entries(text: str, known: Collection[str] = ()) -> Iterator[tuple[int, str]]:
    r"""(line number from 1, path) of each line that is not blank and names no background image.

    Lines end with \n, \r\n or \r, and with nothing else that str.splitlines takes for an end: a file's
    name may hold it. Blanks around a path are left out, unless a file is named so.
    """
    for number, ended in enumerate(io.StringIO(text, newline=None), start=1):
        line = ended.removesuffix("\n")
        name = line if line in known else line.strip()
        if name and not _is_left_out(name):
            yield number, name


def _is_left_out(name: str) -> bool:
    """Caltech-101's published lists name background images; a leftover of macOS's archives is none either."""
    return name.split("/", 1)[0] in (BACKGROUND, "__MACOSX")


def path_problem(name: str) -> str:
    """Why a listed path is not "class/file" below the image folder; empty when it is."""
    if "\\" in name or "\0" in name:
        return "has a backslash or a null character: write class/file"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "leaves the image folder"
    if len(path.parts) != 2:
        return "is not of the form class/file"
    return ""
