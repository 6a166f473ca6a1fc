"""What the bench measures around training: whole studies, and the cache of decoded images."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from caltech_hpo.data.cache import build_cache
from caltech_hpo.data.dataset import DatasetIndex
from caltech_hpo.data.decode import usable_cores
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.search.bench import Progress, Speed
from caltech_hpo.search.request import Place, SearchRequest
from caltech_hpo.spec import StudySpec
from caltech_hpo.study_files import load_study

DECODED = 500  # images a core: threads take a while to start
WARMING = 15  # times the seconds that are asked for: what the first epochs may take, and the next ones


@dataclass(frozen=True)
class StudySpeed:
    """A study of one `model` searched with so many `workers`, for `seconds` or until it had its trials.

    `trials` ended in that time, `epochs` were trained.
    """

    study: str
    model: str
    workers: int
    trials: int
    epochs: int
    seconds: float
    device: str


def of_one_batch_size(study: str) -> StudySpec:
    """The study without hand-tuned rows, its trials of one batch size: numbers of workers compare."""
    spec = load_study(study)
    space = {name: dimension for name, dimension in spec.space.items() if name != "batch_size"}
    return spec.model_copy(update={"space": space, "baselines": ()})


def measure_study(request: SearchRequest, place: Place, *, seconds: float, progress: Progress) -> StudySpeed:
    """Searches in a database of its own, deleted afterwards, and leaves no checkpoints.

    The time begins when every worker has trained an epoch (cuDNN tries its algorithms in the first one), and
    with it the counts; it lasts until there are as many epochs as workers, up to 15 times as long.
    `place.data` must say where the images are: a home of its own has none.
    """
    from caltech_hpo.search.events import TrialEnded, TrialEpoch
    from caltech_hpo.search.run import open_search
    from caltech_hpo.search.urls import default_url

    place.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.cache) as name:
        own = replace(place, home=Path(name), storage=default_url(Path(name)), scratch=place.home)
        with open_search(replace(request, checkpoints=False), own) as opened:
            begin = time.perf_counter()
            epochs = ended = ended_before = 0
            first: set[int] = set()  # trials with an epoch; each worker's first is among the first so many
            for event in opened.events:
                warm = len(first) == opened.workers
                if isinstance(event, TrialEpoch) and warm:
                    epochs += 1
                elif isinstance(event, TrialEpoch):
                    first.add(event.number)
                    if warm := len(first) == opened.workers:
                        begin, ended_before = time.perf_counter(), ended
                ended += isinstance(event, TrialEnded)
                progress(f"{request.study} with --workers {opened.workers}: trials", ended, request.trials)
                taken = time.perf_counter() - begin
                enough = seconds if warm and epochs >= opened.workers else WARMING * seconds
                if taken > enough:
                    break
            taken = time.perf_counter() - begin
            ended -= ended_before
            model = opened.spec.recipe.architecture
            return StudySpeed(request.study, model, opened.workers, ended, epochs, taken, opened.device)


@dataclass(frozen=True)
class CacheSpeed:
    """Decoding `images` files on all `cores`, and what a second start needs to open what is decoded."""

    images: int
    cores: int
    seconds: float
    open_seconds: float

    @property
    def per_core(self) -> float:
        """Images a second and core."""
        return self.images / self.seconds / self.cores


@dataclass
class Measurements:
    """What one run has measured so far."""

    speeds: list[Speed] = field(default_factory=list)
    studies: list[StudySpeed] = field(default_factory=list)
    cache: CacheSpeed | None = None
    lacking: list[str] = field(default_factory=list)  # what could not be measured


def measure_cache(index: DatasetIndex, resize: int, cache: Path, progress: Progress) -> CacheSpeed:
    """Decodes some training images once more, elsewhere; opens the cache that is there."""
    some = index.training[: DECODED * usable_cores()]
    with tempfile.TemporaryDirectory(dir=cache) as name:
        begin = time.perf_counter()
        build_cache(
            index.root, some, resize, Path(name), label="some", skip_unreadable=True, progress=progress
        )
        taken = time.perf_counter() - begin
    begin = time.perf_counter()
    found = load_search_data(index, resize, cache, skip_unreadable=True)
    found.open_training()
    found.open_validation()
    return CacheSpeed(len(some), usable_cores(), taken, time.perf_counter() - begin)
