"""A smoke run: two short trials on a few hundred images, nothing kept."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from caltech_hpo.search.request import Place, SearchRequest
from caltech_hpo.search.urls import default_url

SMOKE_TRIALS, SMOKE_IMAGES = 2, 300


@contextlib.contextmanager
def smoke(request: SearchRequest, place: Place) -> Iterator[tuple[SearchRequest, Place]]:
    """The request and place of a smoke run: 2 trials of 2 epochs on 300 images, nothing kept.

    Data sets stay where they are; database, lock and pixel cache go into a temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="caltech-hpo-smoke-") as folder:
        scratch = Path(folder)
        yield (
            replace(request, trials=SMOKE_TRIALS, subset=SMOKE_IMAGES, enqueue=()),
            replace(place, storage=default_url(scratch), scratch=scratch),
        )
