"""Which folders are classes and which files are images. Reads names alone, opens nothing.

Links are followed where they stay below the data folder. One that leaves it, or leads nowhere, and a
named pipe or a device with an image's name are refused, all of them at once.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from pathlib import Path

from caltech_hpo.data.files import Faults, kind_of, shown
from caltech_hpo.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
BACKGROUND = "BACKGROUND_Google"  # in Caltech-101's archive, and no class
# What systems and programs leave in folders, in lower case; also hidden: .ipynb_checkpoints, ._*, .DS_Store.
LEFTOVERS = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information",
     "thumbs.db", "desktop.ini"}
)  # fmt: skip
# Where an unpacked Caltech-101 archive keeps its class folders, below the folder given.
NESTED_FOLDERS = ("101_ObjectCategories", "caltech-101/101_ObjectCategories")
# Control characters, line and paragraph separators, and what is not UTF-8: no list could name such a file.
ODD_CHARACTERS = frozenset({"Cc", "Zl", "Zp", "Cs"})


def read_folders(root: Path) -> tuple[Path, dict[str, list[str]]]:
    """The folder that holds the class folders, and the image files of each class.

    It is `root`, or Caltech-101's nested folder in it. Classes are in case-insensitive order, files
    sorted. Raises DataError if there is no class folder with an image, and for what is refused.
    """
    if not root.is_dir():
        raise DataError(
            f"{shown(root)}: there is no such folder",
            "give --data a folder with one sub-folder for each class",
        )
    for images in (*(root / nested for nested in NESTED_FOLDERS), root):
        reader = _Reader(root)
        files = reader.classes(images) if images.is_dir() else {}
        if reader.refused.count:
            raise reader.refusal()
        if any(files.values()):
            return images, files
    raise DataError(
        f"{shown(root)}: no class folders with images in it",
        "put the images of each class into a sub-folder named after the class (jpg, png, webp, bmp, tiff)",
    )


def is_class_name(name: str) -> bool:
    """Whether a folder of this name is a class: it is not hidden, the background, or a program's own."""
    return not name.startswith(".") and name != BACKGROUND and name.lower() not in LEFTOVERS


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image: not hidden, and with an image's ending."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def follow(path: Path, base: Path) -> tuple[int, str]:
    """The mode of what `path` leads to (0: nothing), and why it is refused ("": it is not).

    `base` is the data folder without links. Nothing is opened.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
        mode = real.stat().st_mode
    except OSError as error:
        return 0, f"leads nowhere: {error.strerror}"
    if not real.is_relative_to(base):
        return mode, f"leads out of the folder, to {shown(real)}"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return mode, f"{'leads to' if path.is_symlink() else 'is'} {kind_of(mode)}"
    return mode, ""


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


class _Reader:
    """Reads one data folder, noting what it refuses."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = Path(os.path.realpath(root))
        self.refused, self.links, self.odd = Faults(), False, False

    def classes(self, images: Path) -> dict[str, list[str]]:
        """The image files of each class folder in `images`."""
        if why := follow(images, self.base)[1]:
            self.refuse(images, why, link=True)
            return {}
        names = []
        with os.scandir(images) as entries:
            for entry in sorted(entries, key=_name):
                if is_class_name(entry.name) and self.is_class_folder(entry):
                    self.check_name(entry)
                    names.append(entry.name)
        names.sort(key=lambda name: (name.lower(), name))
        return {name: self.image_files(images / name) for name in names}

    def is_class_folder(self, entry: os.DirEntry[str]) -> bool:
        if not entry.is_symlink():
            return entry.is_dir()
        mode, why = follow(Path(entry.path), self.base)
        if mode and not stat.S_ISDIR(mode):
            return False  # beside the class folders a file is no image, wherever it is
        if why:
            self.refuse(entry.path, why, link=True)
        return not why

    def image_files(self, folder: Path) -> list[str]:
        names = []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=_name):
                if is_image_name(entry.name) and self.is_image_file(entry):
                    self.check_name(entry)
                    names.append(entry.name)
        return names

    def is_image_file(self, entry: os.DirEntry[str]) -> bool:
        if entry.is_file(follow_symlinks=False):  # the usual case, which asks the system nothing
            return True
        if entry.is_dir(follow_symlinks=False):
            return False
        mode, why = follow(Path(entry.path), self.base)
        if why:
            self.refuse(entry.path, why, link=entry.is_symlink())
        return not why and stat.S_ISREG(mode)

    def check_name(self, entry: os.DirEntry[str]) -> None:
        if not entry.name.isprintable() and ODD_CHARACTERS & {unicodedata.category(c) for c in entry.name}:
            self.refuse(entry.path, "has a name that is not UTF-8 or has control characters", link=False)
            self.odd = True

    def refuse(self, path: Path | str, why: str, *, link: bool) -> None:
        self.refused.add(f"{shown(Path(path).relative_to(self.root))} {why}")
        self.links |= link

    def refusal(self) -> DataError:
        ways = []
        if self.links:
            ways.append(
                "put the files themselves in place of the links ('cp -rL FOLDER COPY' makes a copy that "
                f"has them), or keep what the links lead to below {shown(self.root)}, for example in "
                f"{shown(self.root / '.shared')}"
            )
        if self.odd:
            ways.append("rename the files")
        what = f"{shown(self.root)}: {self.refused.count} file(s) or folder(s) that cannot be used"
        return DataError(f"{what}:\n{self.refused}", "; ".join(ways) or "remove them")
