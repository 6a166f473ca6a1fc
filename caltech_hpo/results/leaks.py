"""Test images whose pixels are in training or validation too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from caltech_hpo.data.decode import Pixels
from caltech_hpo.data.duplicates import TEST, Group, shared_images
from caltech_hpo.data.files import Faults, shown
from caltech_hpo.errors import DataError
from caltech_hpo.search.request import Say


def find_leaks(splits: Mapping[str, Mapping[str, Pixels]]) -> list[Group]:
    """The groups of images with the same pixels of which one is a test image and one is not.

    `splits` are the decoded images of each by their paths.
    """
    return [group for group in shared_images(splits) if group.is_leak]


def count_leaked(leaks: Sequence[Group]) -> int:
    """How many test images they hold."""
    return sum(split == TEST for group in leaks for split, _ in group.members)


def refuse_leaks(study: str, leaks: Sequence[Group], say: Say, *, allowed: bool) -> None:
    """Raises DataError naming the leaks, or says that there are some where they are `allowed`."""
    if not leaks:
        return
    faults = Faults()
    for group in leaks:
        faults.add(shown(group))
    what = f"study '{study}': {count_leaked(leaks)} test image(s) are training or validation images too"
    if allowed:
        say(f"warning: {what}; the score will be too good, and its metrics.json names them\n{faults}")
        return
    raise DataError(
        f"{what}:\n{faults}",
        "remove one of each ('caltech-hpo data check' lists them) and search again, or score all the same: "
        "--allow-leak",
    )
