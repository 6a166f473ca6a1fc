"""From a data folder to decoded splits. The test split has a function and a type of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from caltech_hpo.data.cache import LabeledImages, Progress, build_cache, open_cache, read_index
from caltech_hpo.data.dataset import DatasetIndex, Sample
from caltech_hpo.data.decode import Pixels
from caltech_hpo.data.files import shown
from caltech_hpo.errors import DataError, UnreadableImagesError

MOST_NAMED = 3  # unreadable images, in a message
WITHOUT = "-without"  # in a fingerprint, before how many images could not be read


@dataclass(frozen=True)
class SearchData:
    """Training and validation images as cache files (picklable, opened where they are used).

    `fingerprint` names the data set, and what was left out of it: unreadable images, or all but a
    smoke run's subset.
    """

    classes: tuple[str, ...]
    fingerprint: str
    training_cache: Path
    validation_cache: Path

    @property
    def caches(self) -> dict[str, Path]:
        """The cache files by the names of their splits."""
        return {"training": self.training_cache, "validation": self.validation_cache}

    def open_training(self) -> LabeledImages:
        """The training images, memory-mapped."""
        return open_cache(self.training_cache)

    def open_validation(self) -> LabeledImages:
        """The validation images, memory-mapped."""
        return open_cache(self.validation_cache)


@dataclass(frozen=True)
class TestData:
    """The test images. Only results/final.py may load them (tests/test_layers.py holds it to that)."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    classes: tuple[str, ...]
    fingerprint: str
    test_cache: Path

    def open_test(self) -> LabeledImages:
        """The test images, memory-mapped."""
        return open_cache(self.test_cache)


def load_search_data(
    index: DatasetIndex, resize: int, cache: Path, *, skip_unreadable: bool = False,
    subset: int | None = None, progress: Progress | None = None,
) -> SearchData:  # fmt: skip
    """Decodes the training and validation images into the cache (once) and returns where they are.

    `subset` keeps that many evenly spaced images of each split, for a smoke run. Raises
    UnreadableImagesError and DataError as `build_cache` does.
    """
    parts = {"training": index.training, "validation": index.validation}
    fingerprint = index.fingerprint
    if subset is not None:
        parts = {name: thin(samples, subset) for name, samples in parts.items()}
        fingerprint = f"{fingerprint}-smoke{subset}"
    caches, faults = {}, []
    for name, samples in parts.items():
        try:
            caches[name] = build_cache(
                index.root, samples, resize, cache, label=name,
                skip_unreadable=skip_unreadable, progress=progress,
            )  # fmt: skip
        except UnreadableImagesError as error:  # whoever mends one split wants to know of the other
            faults.append(error)
    if faults:
        raise UnreadableImagesError("\n".join(fault.message for fault in faults), faults[0].fix)
    left_out = sum(len(read_index(path)["unreadable"]) for path in caches.values())
    if left_out:
        _check_coverage(index, parts["training"], caches)
        fingerprint = f"{fingerprint}{WITHOUT}{left_out}"
    return SearchData(index.classes, fingerprint, caches["training"], caches["validation"])


def _check_coverage(index: DatasetIndex, training: Sequence[Sample], caches: dict[str, Path]) -> None:
    """Raises DataError if the unreadable images were all of a class's training or all of a split."""
    missing = unreadable_classes(index, training, caches["training"])
    if missing or not read_index(caches["validation"])["labels"]:
        what = (
            f"no readable training image of {', '.join(missing)}"
            if missing
            else "no readable validation image"
        )
        raise DataError(f"{index.root}: {what}", "replace the unreadable images")


def split_sizes(data: SearchData) -> tuple[int, int]:
    """How many images training and validation have."""
    training, validation = (len(read_index(cache)["labels"]) for cache in data.caches.values())
    return training, validation


def described(root: Path, data: SearchData) -> str:
    """What is trained on: a study's own images may have been replaced."""
    training, validation = split_sizes(data)
    return (
        f"images of {shown(root)}: {training:,} for training, {validation:,} for validation, "
        f"{len(data.classes)} classes"
    )


def left_out(caches: Mapping[str, Path]) -> str:
    """How many images of the splits, by name, could not be read, and some of them; "" if all could."""
    found = [f"{name}: {path}" for name, cache in caches.items() for path in read_index(cache)["unreadable"]]
    if not found:
        return ""
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return f"left out, since unreadable: {len(found)} image(s) ({', '.join(found[:MOST_NAMED])}{more})"


def unreadable_classes(index: DatasetIndex, samples: Sequence[Sample], cache: Path) -> list[str]:
    """Classes of which no image of the split could be read."""
    there = set(read_index(cache)["labels"])
    return [index.classes[label] for label in sorted({sample.label for sample in samples} - there)]


def readable(samples: Sequence[Sample], cache: Path) -> list[Sample]:
    """Those of a split's samples that are in its cache, in its order."""
    unreadable = read_index(cache)["unreadable"]
    return [sample for sample in samples if sample.path not in unreadable]


def named_images(samples: Sequence[Sample], cache: Path) -> dict[str, Pixels]:
    """The decoded images of a split by their paths; what could not be read is left out."""
    kept = [sample.path for sample in readable(samples, cache)]
    return dict(zip(kept, open_cache(cache).images, strict=True))


def thin(samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
    """`count` samples, evenly spaced; all of them when there are fewer."""
    if len(samples) <= count:
        return tuple(samples)
    return tuple(samples[i * len(samples) // count] for i in range(count))


def load_test_data(
    index: DatasetIndex, resize: int, cache: Path, *, skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> TestData:  # fmt: skip
    """Decodes the test images into a cache file of their own and returns where it is."""
    path = build_cache(
        index.root, index.test, resize, cache, label="test",
        skip_unreadable=skip_unreadable, progress=progress,
    )  # fmt: skip
    return TestData(index.classes, index.fingerprint, path)
