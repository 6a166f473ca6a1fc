"""What `data check` reports: counts, unreadable files, images that are in two splits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.dataset import DatasetIndex
from caltech_hpo.data.decode import decode_all
from caltech_hpo.data.duplicates import contradicting, digest, groups

CHECK_SIZE = 256  # the short side at which most studies compare


@dataclass(frozen=True)
class ClassCount:
    """How many images of a class lie in each split."""

    name: str
    training: int
    validation: int
    test: int


@dataclass(frozen=True)
class CheckResult:
    """The findings. `unreadable` maps a path to the reason.

    `leaks` are groups of images with the same decoded pixels of which one is in the test split and one in
    training or validation; `duplicates` are in training and validation alone; `contradictions` are in one
    split under several classes. A path is written "split: class/file".
    """

    root: Path
    split_source: str
    unlisted: int
    classes: tuple[ClassCount, ...]
    unreadable: dict[str, str]
    leaks: tuple[tuple[str, ...], ...]
    duplicates: tuple[tuple[str, ...], ...]
    contradictions: tuple[tuple[str, ...], ...]

    @property
    def has_faults(self) -> bool:
        """Whether `search` or `final` would stop: duplicates do no more than flatter the validation."""
        return bool(self.unreadable or self.leaks)


def check(index: DatasetIndex, *, progress: Progress | None = None) -> CheckResult:
    """Decodes every image once, at the size that studies keep them at."""
    splits = {"training": index.training, "validation": index.validation, "test": index.test}
    counts = {name: Counter(sample.label for sample in samples) for name, samples in splits.items()}
    named = [(name, sample.path) for name, samples in splits.items() for sample in samples]
    unreadable: dict[str, str] = {}
    digests: list[tuple[bytes, tuple[str, str]]] = []
    decoded = decode_all([index.root / path for _, path in named], CHECK_SIZE)
    for done, ((split, path), pixels) in enumerate(zip(named, decoded, strict=True), start=1):
        if isinstance(pixels, str):
            unreadable[f"{split}: {path}"] = pixels
        else:
            digests.append((digest(pixels), (split, path)))
        if progress:
            progress("checking images", done, len(named))
    found = groups(digests)
    return CheckResult(
        root=index.root,
        split_source=index.split_source,
        unlisted=index.unlisted,
        classes=tuple(
            ClassCount(name, counts["training"][i], counts["validation"][i], counts["test"][i])
            for i, name in enumerate(index.classes)
        ),
        unreadable=unreadable,
        leaks=tuple(group.names for group in found if group.is_leak),
        duplicates=tuple(group.names for group in found if not group.is_leak),
        contradictions=tuple(group.names for group in contradicting(digests)),
    )
