"""Class folders or split files to classes, samples and splits. Reads names and sizes, never pixels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from caltech_hpo.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
NOT_CLASSES = frozenset({"BACKGROUND_Google", "__MACOSX"})
# Where an unpacked Caltech-101 archive keeps its class folders, below the folder given.
NESTED_FOLDERS = ("101_ObjectCategories", "caltech-101/101_ObjectCategories")
EVERY_THIRD = 3


@dataclass(frozen=True)
class Sample:
    """One image: its path relative to the image folder ("class/file", with "/") and its class number."""

    path: str
    label: int


@dataclass(frozen=True)
class DatasetIndex:
    """The images of a data set by name.

    `classes` are in case-insensitive order; a label is a position in them. `training` and
    `validation` are the even and odd positions of the train list. `split_source` says whether
    lists or the split rule made the split; `unlisted` counts images that the lists leave out.
    """

    root: Path
    classes: tuple[str, ...]
    training: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]
    split_source: str
    unlisted: int = 0

    @cached_property  # asks the system for the size of every file
    def fingerprint(self) -> str:
        """16 hexadecimal digits over classes, split and every image's path and size in bytes.

        A copy of the data elsewhere has the same fingerprint.
        """
        total = hashlib.sha256("\n".join(self.classes).encode())
        for part in (self.training, self.validation, self.test):
            total.update(b"\0split\0")
            for sample in part:
                total.update(f"{sample.path}\0{(self.root / sample.path).stat().st_size}\n".encode())
        return total.hexdigest()[:16]


def find_images(root: Path) -> Path:
    """The folder that holds the class folders: `root`, or Caltech-101's nested folder in it.

    Raises DataError if there is no class folder with an image.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: there is no such folder", "give --data a folder with one sub-folder for each class"
        )
    for candidate in (*(root / nested for nested in NESTED_FOLDERS), root):
        if candidate.is_dir() and any(class_images(folder) for folder in class_folders(candidate)):
            return candidate
    raise DataError(
        f"{root}: no class folders with images in it",
        "put the images of each class into a sub-folder named after the class (jpg, png, webp, bmp, tiff)",
    )


def class_folders(images: Path) -> list[Path]:
    """The class folders, in case-insensitive order; hidden ones and the background are no classes."""
    folders = [
        entry
        for entry in images.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in NOT_CLASSES
    ]
    return sorted(folders, key=lambda folder: (folder.name.lower(), folder.name))


def class_images(folder: Path) -> list[str]:
    """The names of a class folder's images, sorted; hidden files and other file types are left out."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )


def scan(root: Path) -> DatasetIndex:
    """Finds classes and splits below `root`.

    With train.txt and test.txt in `root` (or beside the class folders) the lists decide;
    otherwise, over all images in class order, image i is test when i % 3 == 0. Raises DataError
    for an empty class, a class without a training image, a faulty list, or a folder that cannot be read.
    """
    try:
        return _scan(root)
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror}", "check the data folder's permissions"
        ) from error


def _scan(root: Path) -> DatasetIndex:
    images = find_images(root)
    folders = class_folders(images)
    names = {folder.name: class_images(folder) for folder in folders}
    odd = [f"{name}/{file}" for name, found in names.items() for file in found if not _is_text(name + file)]
    if odd:
        raise DataError(f"{images}: file names that are not UTF-8: {odd[0]!r}", "rename the files")
    empty = [name for name, found in names.items() if not found]
    if empty:
        raise DataError(
            f"{images}: class folder(s) without an image: {', '.join(empty)}",
            "add images to them or remove the folders",
        )
    classes = tuple(names)
    if len(classes) < 2:
        raise DataError(
            f"{images}: only one class, {classes[0]}", "a classifier needs at least two class folders"
        )
    everything = [
        Sample(f"{name}/{file}", label) for label, name in enumerate(classes) for file in names[name]
    ]
    lists = find_lists(root, images)
    if lists is None:
        train = [sample for i, sample in enumerate(everything) if i % EVERY_THIRD]
        test = [sample for i, sample in enumerate(everything) if i % EVERY_THIRD == 0]
        source, unlisted = "split rule: every third image is test", 0
    else:
        train, test = read_lists(*lists, images, everything)
        source, unlisted = f"lists: {lists[0]}, {lists[1]}", len(everything) - len(train) - len(test)
    index = DatasetIndex(
        images, classes, tuple(train[0::2]), tuple(train[1::2]), tuple(test), source, unlisted
    )
    _check_coverage(index)
    return index


def _is_text(name: str) -> bool:
    """Whether a file name can be written as UTF-8 (the system allows any bytes)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_coverage(index: DatasetIndex) -> None:
    counts = Counter(sample.label for sample in index.training)
    missing = [name for label, name in enumerate(index.classes) if not counts[label]]
    if missing:
        raise DataError(
            f"{index.root}: class(es) without a training image: {', '.join(missing)}",
            "give each class at least 3 images, or list one at an even place of train.txt",
        )
    for part in ("validation", "test"):
        if not getattr(index, part):
            raise DataError(f"{index.root}: the {part} split is empty", "add images")


def find_lists(root: Path, images: Path) -> tuple[Path, Path] | None:
    """train.txt and test.txt in `root` or beside the class folders, or None; one alone is an error."""
    for folder in dict.fromkeys((root, images)):
        train, test = folder / "train.txt", folder / "test.txt"
        if train.is_file() and test.is_file():
            return train, test
        if train.is_file() or test.is_file():
            present, absent = (train, test) if train.is_file() else (test, train)
            raise DataError(
                f"{present}: there is no {absent.name} beside it",
                f"add {absent.name}, or remove {present.name} to split by rule",
            )
    return None


def read_lists(
    train_list: Path, test_list: Path, images: Path, everything: Sequence[Sample]
) -> tuple[list[Sample], list[Sample]]:
    """The samples that the two lists name, in their order.

    Raises DataError naming the list and line of a missing file, a path that leaves the folder, a
    path listed twice, or an image in both lists.
    """
    known = {sample.path: sample for sample in everything}
    problems: list[str] = []
    train = _read_list(train_list, known, problems)
    test = _read_list(test_list, known, problems)
    both = sorted({sample.path for sample in train} & {sample.path for sample in test})
    problems.extend(f"{test_list}: {path} is also in {train_list.name}" for path in both[:5])
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(
            f"{len(problems)} error(s) in the split files:\n{shown}{more}",
            f"mend the lists; each line is class/file below {images}",
        )
    return train, test


def _read_list(path: Path, known: dict[str, Sample], problems: list[str]) -> list[Sample]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read as UTF-8 text: {error}")
        return []
    samples: dict[str, Sample] = {}
    for number, name in list_entries(lines):
        problem = path_problem(name)
        if not problem:
            name = str(PurePosixPath(name))  # "./a/b" is "a/b"
            if name not in known:
                problem = "names an image that is not there"
            elif name in samples:
                problem = "is listed twice"
        if problem:
            problems.append(f"{path}:{number}: {name} {problem}")
        else:
            samples[name] = known[name]
    return list(samples.values())


def list_entries(lines: Iterable[str]) -> list[tuple[int, str]]:
    """(line number from 1, path) of each line that is not blank and names no background image."""
    stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    return [(n, name) for n, name in stripped if name and name.split("/", 1)[0] not in NOT_CLASSES]


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
