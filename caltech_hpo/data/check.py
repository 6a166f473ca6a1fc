"""What `data check` reports: counts, unreadable files, identical images across splits."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from caltech_hpo.data.cache import Progress, decode_all
from caltech_hpo.data.dataset import DatasetIndex

CHECK_SIZE = 64


@dataclass(frozen=True)
class ClassCount:
    """How many images of a class lie in each split."""

    name: str
    training: int
    validation: int
    test: int


@dataclass(frozen=True)
class CheckResult:
    """The findings. `unreadable` maps a path to the reason; `identical` groups paths by same content.

    A path is written "split: class/file". Groups listed have members in more than one split.
    """

    root: Path
    split_source: str
    unlisted: int
    classes: tuple[ClassCount, ...]
    unreadable: dict[str, str]
    identical: tuple[tuple[str, ...], ...]


def check(index: DatasetIndex, *, progress: Progress | None = None) -> CheckResult:
    """Decodes every image once. Two count as identical when their pixels at short side 64 are equal."""
    splits = {"training": index.training, "validation": index.validation, "test": index.test}
    counts = {name: Counter(sample.label for sample in samples) for name, samples in splits.items()}
    named = [(name, sample.path) for name, samples in splits.items() for sample in samples]
    unreadable: dict[str, str] = {}
    groups: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    decoded = decode_all([index.root / path for _, path in named], CHECK_SIZE)
    for done, ((split, path), pixels) in enumerate(zip(named, decoded, strict=True), start=1):
        if isinstance(pixels, str):
            unreadable[f"{split}: {path}"] = pixels
        else:
            digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
            groups[digest].append((split, path))
        if progress:
            progress("checking images", done, len(named))
    return CheckResult(
        root=index.root,
        split_source=index.split_source,
        unlisted=index.unlisted,
        classes=tuple(
            ClassCount(name, counts["training"][i], counts["validation"][i], counts["test"][i])
            for i, name in enumerate(index.classes)
        ),
        unreadable=unreadable,
        identical=tuple(
            tuple(f"{split}: {path}" for split, path in group)
            for group in groups.values()
            if len({split for split, _ in group}) > 1
        ),
    )
