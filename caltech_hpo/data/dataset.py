"""Class folders or split files to classes, samples and splits. Reads names and sizes, never pixels."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from caltech_hpo.data.folders import read_folders
from caltech_hpo.data.lists import find_lists, read_lists
from caltech_hpo.errors import DataError

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


def scan(root: Path) -> DatasetIndex:
    """Finds classes and splits below `root`.

    With train.txt and test.txt in `root` (or beside the class folders) the lists decide;
    otherwise, over all images in class order, image i is test when i % 3 == 0. Raises DataError
    for an empty class, a class without a training image, a faulty list, a folder that cannot be read, and
    for links out of `root` or anything but a file with an image's name.
    """
    try:
        return _scan(root)
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror}", "check the data folder's permissions"
        ) from error


def _scan(root: Path) -> DatasetIndex:
    images, names = read_folders(root)
    empty = [name for name, found in names.items() if not found]
    if empty:
        raise DataError(
            f"{images}: class folder(s) without an image: {', '.join(map(repr, empty))}",
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
        source, unlisted = "by rule: every third image is test", 0
    else:
        known = {sample.path: sample for sample in everything}
        listed = read_lists(*lists, images, known)
        train, test = ([known[path] for path in paths] for paths in listed)
        source, unlisted = f"lists: {lists[0]}, {lists[1]}", len(everything) - len(train) - len(test)
    index = DatasetIndex(
        images, classes, tuple(train[0::2]), tuple(train[1::2]), tuple(test), source, unlisted
    )
    _check_coverage(index)
    return index


def _check_coverage(index: DatasetIndex) -> None:
    counts = Counter(sample.label for sample in index.training)
    missing = [name for label, name in enumerate(index.classes) if not counts[label]]
    if missing:
        raise DataError(
            f"{index.root}: class(es) without a training image: {', '.join(missing)}",
            "give each class at least 3 images"
            if "rule" in index.split_source
            else "list one of each on an odd line (1, 3, 5 ...) of train.txt: even ones are validation",
        )
    for part in ("validation", "test"):
        if not getattr(index, part):
            raise DataError(f"{index.root}: the {part} split is empty", "add images")
