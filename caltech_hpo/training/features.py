"""Outputs of a frozen prefix, computed once and kept on disk as .npy files.

A prefix that does not learn gives the same output for the same view of an image in every epoch of
every trial. Where a recipe shows it finitely many views (the centre crop, and perhaps its mirror
image), they are computed once, and only what follows the prefix is trained, on them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from caltech_hpo.data.batches import BatchPlan, Images
from caltech_hpo.data.cache import sync_folder, waits_for
from caltech_hpo.data.kernel_check import kernels_run
from caltech_hpo.errors import DataError
from caltech_hpo.spec import Recipe
from caltech_hpo.terms import Precision
from caltech_hpo.training.device import autocast, try_algorithms
from caltech_hpo.training.sources import FeatureSource, ImageSource
from caltech_hpo.training.timm_models import timm_version
from caltech_hpo.training.weights import state_sha256

# Features of a view may take this much: about what its decoded pixels take. More is read from disk
# more slowly than an early, cheap prefix computes it.
MOST_BYTES = 300 * 1024
CHUNK = 64  # images at a time, the same for every recipe
WAIT = 5.0  # seconds between two words of a worker that waits for another's features
# (what is being done, how many are done, how many there are)
Step = tuple[str, int, int]


@dataclass(frozen=True)
class Split:
    """Decoded images of one or more cache files, and the files' names, which say what is in them.

    They are all in the files or all in the device's memory.
    """

    parts: tuple[tuple[Images, str], ...]

    @property
    def images(self) -> Images:
        """All of them."""
        return functools.reduce(operator.add, (images for images, _ in self.parts))


@dataclass(frozen=True)
class _Stored:
    """Where the features of one view of some images are kept; `what` names them."""

    images: Images
    flipped: bool
    file: Path
    what: str


def feature_sources(
    prefix: nn.Module, recipe: Recipe, splits: Mapping[str, tuple[Split, int]], plan: BatchPlan, folder: Path,
    precision: Precision,
) -> Iterator[Step | list[FeatureSource]]:  # fmt: skip
    """Opens the stored features of splits, computing what is missing; yields steps, then the sources.

    Each of `splits` has a name and says how many views of its images are wanted (1, or 2 with the mirrored
    ones). Workers that begin together share the work: each computes what nobody else does before it waits.
    The list is empty where the features would be too large to keep. Raises DataError where they cannot be
    written.
    """
    state = state_sha256(prefix.state_dict(), repr(prefix))
    stored = {
        label: [
            [
                _Stored(
                    images, bool(view),
                    folder / f"{feature_key(state, recipe, plan, name, view, precision)}.npy",
                    f"features of the {label} images" + (", mirrored" if view else ""),
                )
                for images, name in split.parts
            ]
            for view in range(views)
        ]
        for label, (split, views) in splits.items()
    }  # fmt: skip
    missing = [
        part for views in stored.values() for parts in views for part in parts
        if stored_features(part.file) is None
    ]  # fmt: skip
    if missing and feature_bytes(prefix, plan, precision) > MOST_BYTES:
        yield []
        return
    for waits in (False, True):
        for part in missing:
            yield from _compute(prefix, part, plan, precision, waits=waits)
    yield [_opened(stored[label], split, plan) for label, (split, _) in splits.items()]


def _opened(views: Sequence[Sequence[_Stored]], split: Split, plan: BatchPlan) -> FeatureSource:
    read = [[read_features(part.file) for part in parts] for parts in views]
    kept = tuple(
        (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(plan.device) for tensors in read
    )
    labels = torch.cat([torch.as_tensor(images.labels) for images, _ in split.parts])
    return FeatureSource(kept, labels.to(plan.device), plan)


def feature_key(
    state: str, recipe: Recipe, plan: BatchPlan, pixels: str, view: int, precision: Precision
) -> str:
    """24 hexadecimal digits over everything that decides the features of one view of one split."""
    decides = [
        state, pixels, view, recipe.crop, plan.normalization.mean, plan.normalization.std, precision,
        plan.device.type, torch.__version__, timm_version(recipe.architecture),
    ]  # fmt: skip
    decides += ["kernels"] if kernels_run(plan.device) else []  # which round less often
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:24]


@torch.inference_mode()
def feature_bytes(prefix: nn.Module, plan: BatchPlan, precision: Precision) -> int:
    """Bytes of one view's features."""
    prefix.eval()
    try_algorithms(wanted=False)
    with autocast(plan.device, precision):
        one: Tensor = prefix(torch.zeros(1, 3, plan.crop, plan.crop, device=plan.device))
    return one.numel() * one.element_size()


def _compute(
    prefix: nn.Module, part: _Stored, plan: BatchPlan, precision: Precision, *, waits: bool
) -> Iterator[Step]:  # fmt: skip
    """Writes the features to a temporary file, syncs, renames; another worker's result is kept.

    Does nothing where another one computes them, unless it `waits` for that.
    """
    images, file, what = part.images, part.file, part.what
    folder = file.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    source = ImageSource(images, BatchPlan(CHUNK, plan.crop, plan.normalization, plan.device))
    lock = FileLock(file.with_suffix(".lock"))
    for _ in waits_for(lock, WAIT if waits else 0.0):
        if not waits:
            return
        # not silently: whoever says nothing for long counts as hung
        yield f"waiting for the {what}, which another worker computes", 0, len(images)
    try:
        if stored_features(file) is not None:
            return
        try:
            with temporary.open("wb") as out:
                done = 0
                for pixels, _ in source.evaluation(flipped=part.flipped):
                    try_algorithms(wanted=len(pixels) == CHUNK)
                    rows = _rows(prefix, pixels, plan, precision)
                    if not done:
                        _write_header(out, rows, len(images))
                    out.write(rows.data)
                    done += len(rows)
                    yield what, done, len(images)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(file)
            sync_folder(folder)
        except OSError as error:
            raise DataError(
                f"{temporary}: features cannot be kept: {error.strerror}",
                "make room, check permissions, or give another --home",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
    finally:
        lock.release()


def _rows(
    prefix: nn.Module, pixels: Tensor, plan: BatchPlan, precision: Precision
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.uint16]]:
    with torch.inference_mode(), autocast(plan.device, precision):
        outputs: Tensor = prefix(pixels)
    outputs = outputs.cpu().contiguous()
    # NumPy has no bfloat16: its bits are kept as 16-bit integers.
    return (outputs.view(torch.uint16) if outputs.dtype == torch.bfloat16 else outputs.float()).numpy()


def _write_header(out: object, rows: np.ndarray[tuple[int, ...], np.dtype[np.generic]], count: int) -> None:
    header = {"descr": rows.dtype.str, "fortran_order": False, "shape": (count, *rows.shape[1:])}
    np.lib.format.write_array_header_1_0(out, header)  # type: ignore[arg-type]


def stored_features(file: Path) -> Tensor | None:
    """The features, or None where there are none, or damaged ones, which are then made again."""
    try:
        return read_features(file)
    except (OSError, ValueError, EOFError):
        return None


def read_features(file: Path) -> Tensor:
    """Maps a feature file: (n, ...) float32 or bfloat16. A damaged file raises ValueError."""
    # "c": private pages, since torch would warn of an array that cannot be written
    rows = np.load(file, mmap_mode="c", allow_pickle=False)
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if rows.dtype == np.uint16 else tensor
