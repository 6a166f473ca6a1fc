"""Images that are in two splits: with the same decoded pixels, whatever their names and files."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from caltech_hpo.data.decode import Pixels

TEST = "test"
MOST_MEMBERS = 6


@dataclass(frozen=True)
class Group:
    """Images of more than one split with the same pixels: (split, "class/file") each."""

    members: tuple[tuple[str, str], ...]

    @property
    def is_leak(self) -> bool:
        """Whether the test set has an image that training or validation has too."""
        return any(split == TEST for split, _ in self.members)

    @property
    def names(self) -> tuple[str, ...]:
        """The members as "split: class/file"."""
        return tuple(f"{split}: {path}" for split, path in self.members)

    def __str__(self) -> str:
        more = [f"{len(self.members) - MOST_MEMBERS} more"] if len(self.members) > MOST_MEMBERS else []
        return " = ".join([*self.names[:MOST_MEMBERS], *more])


def digest(pixels: Pixels) -> bytes:
    """Equal for equal pixels of equal shape, and for nothing else."""
    total = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    total.update(pixels.tobytes())
    return total.digest()


Keyed = Iterable[tuple[Hashable, tuple[str, str]]]


def groups(keyed: Keyed) -> list[Group]:
    """(key, (split, path)) of each image to the groups of one key that have members in several splits."""
    return [group for group in _same(keyed) if len({split for split, _ in group.members}) > 1]


def contradicting(keyed: Keyed) -> list[Group]:
    """As `groups`, those of one key within one split that are of several classes ("class/file")."""
    return [
        group for group in _same(keyed)
        if len({split for split, _ in group.members}) == 1
        and len({path.partition("/")[0] for _, path in group.members}) > 1
    ]  # fmt: skip


def _same(keyed: Keyed) -> list[Group]:
    found: dict[Hashable, list[tuple[str, str]]] = defaultdict(list)
    for key, member in keyed:
        found[key].append(member)
    return [Group(tuple(members)) for members in found.values()]


def shared_images(splits: Mapping[str, Mapping[str, Pixels]]) -> list[Group]:
    """The groups among decoded splits, each a mapping of paths to pixels.

    Reads little: of most images one row, all of those alone whose shape and middle row are another's too.
    """
    rows = (
        ((pixels.shape, pixels[len(pixels) // 2].tobytes()), (split, path))
        for split, images in splits.items()
        for path, pixels in images.items()
    )
    alike = (member for group in groups(rows) for member in group.members)
    return groups((digest(splits[split][path]), (split, path)) for split, path in alike)
