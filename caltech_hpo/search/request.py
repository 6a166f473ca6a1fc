"""What a search is asked to do, where it keeps things, and the spec that follows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from caltech_hpo.errors import SpecError, UsageError, WeightsError
from caltech_hpo.search.urls import shown, sqlite_path
from caltech_hpo.spec import Hyperparameters, StudySpec
from caltech_hpo.study_checks import describe
from caltech_hpo.study_files import complete_params, load_study
from caltech_hpo.terms import TIMM, Precision

SMOKE_EPOCHS = 2
DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]+)?")
Say = Callable[[str], None]


def silent(text: str) -> None:
    """The `Say` of a caller that wants no messages."""


def never() -> bool:
    """Nobody asks a search to stop."""
    return False


@dataclass(frozen=True)
class Place:
    """Where things are kept: the home folder and the study database's URL.

    `data` is the folder that replaces a study's own data set.
    """

    home: Path
    storage: str
    data: Path | None = None
    scratch: Path | None = None  # a smoke run's throw-away folder for the cache

    @property
    def cache(self) -> Path:
        """Decoded pixels."""
        return (self.scratch or self.home) / "cache"

    @property
    def features(self) -> Path:
        """Outputs of frozen prefixes."""
        return self.cache / "features"

    @property
    def backups(self) -> Path:
        """Copies of the study database."""
        return self.home / "backups"

    @property
    def checkpoints(self) -> Path:
        """Where running trials stand."""
        return self._of_database("checkpoints")

    @property
    def datasets(self) -> Path:
        """Fetched data sets."""
        return self.home / "datasets"

    @property
    def models(self) -> Path:
        """What `final` writes."""
        return self.home / "models"

    @property
    def best_weights(self) -> Path:
        """The weights of each study's best trial."""
        return self._of_database("models")

    def _of_database(self, kind: str) -> Path:
        """A folder for what is kept by study names alone: beside the database, as its locks are.

        Two databases with a study of the same name have two of them.
        """
        path = sqlite_path(self.storage)
        if path is None:
            own = hashlib.sha256(shown(self.storage).encode()).hexdigest()[:8]
            return self.home / f"{kind}-{own}"
        return path.absolute().parent / (kind if path.name == "studies.db" else f"{path.name}-{kind}")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what each worker takes of it. `address` None starts one on this machine."""

    address: str | None = None
    gpus: float = 0.0
    cpus: float = 1.0


def sharing(workers: int, cluster: Cluster | None) -> int:
    """How many of the workers have one GPU, or one machine, to share."""
    if cluster is None or not cluster.gpus:
        return workers
    return min(workers, max(1, int(1 / cluster.gpus)))


@dataclass(frozen=True)
class SearchRequest:
    """What `search` was asked to do. `trials` is the study's total of finished trials.

    Without `pruning` no trial ends for lagging in this run; what diverges still ends. `memory` bytes may
    be used by all workers together (None: most of what is free). A trial ends with its first epoch after
    `trial_minutes`. `spec` stands in for the study's file. Without `checkpoints` no trial can be gone on
    with. Workers run on `cluster` (None: as processes of this machine).
    """

    study: str
    trials: int
    workers: int = 1
    device: str = "auto"
    seed: int = 0
    timeout_minutes: float | None = None
    baselines: bool = True
    pruning: bool = True
    enqueue: tuple[dict[str, Any], ...] = ()
    allow_changed: bool = False
    skip_unreadable: bool = False
    precision: Precision | None = None
    weights: str | None = None
    subset: int | None = None
    memory: int | None = None
    trial_minutes: float | None = None
    spec: StudySpec | None = None
    checkpoints: bool = True
    cluster: Cluster | None = None


def resolve_spec(request: SearchRequest) -> StudySpec:
    """The study file with the request's overrides. Raises UsageError, SpecError and WeightsError."""
    spec = request.spec or load_study(request.study)
    if not DEVICE.fullmatch(request.device):
        raise UsageError(f"--device {request.device}: unknown", "use one of: auto, cpu, cuda, cuda:K, mps")
    if request.workers < 1:
        raise UsageError(f"workers: {request.workers}", "give at least 1")
    changes = {"precision": request.precision, "weights": request.weights}
    given = {name: value for name, value in changes.items() if value is not None}
    if given:
        spec = spec.model_copy(update={"recipe": spec.recipe.model_copy(update=given)})
    spec = with_own_sizes(spec)
    if spec.recipe.weights not in ("none", "imagenet") and not Path(spec.recipe.weights).is_file():
        raise WeightsError(f"{spec.recipe.weights}: there is no such weights file", "give --weights FILE")
    for params in request.enqueue:
        check_enqueued(spec, params)
    return spec if request.subset is None else shortened(spec)


def with_own_sizes(spec: StudySpec) -> StudySpec:
    """A model of timm gets the resize and crop that timm evaluates it with, unless the file gives them."""
    recipe = spec.recipe
    if not recipe.architecture.startswith(TIMM):
        return spec
    from caltech_hpo.training.timm_models import timm_sizes

    own = dict(zip(("resize", "crop"), timm_sizes(recipe.architecture), strict=True))
    missing = {name: size for name, size in own.items() if name not in recipe.model_fields_set}
    try:
        changed = Hyperparameters.model_validate({**recipe.model_dump(), **missing})
    except ValidationError as error:
        sizes = f"timm evaluates it with resize {own['resize']}, crop {own['crop']}"
        problems = "; ".join(describe(error, "recipe"))
        raise SpecError(
            f"study '{spec.name}': {problems}", f"give recipe.resize and recipe.crop; {sizes}"
        ) from error
    return spec.model_copy(update={"recipe": changed})


def check_enqueued(spec: StudySpec, params: dict[str, Any]) -> None:
    """Numbers may lie outside the space (the user knows), but must be possible; choices must be listed.

    What is left out is taken from `[recipe]`.
    """
    unknown = [name for name in params if name not in spec.space]
    if unknown:
        raise UsageError(
            f"--enqueue: {', '.join(unknown)} not in the space of '{spec.name}'",
            f"its space: {', '.join(spec.space)}",
        )
    for name, value in params.items():
        choices = getattr(spec.space[name], "choices", None)
        if choices is not None and value not in choices:
            raise UsageError(f"--enqueue: {name}={value} is not one of {', '.join(map(str, choices))}")
    try:
        Hyperparameters.model_validate({**spec.recipe.model_dump(), **params})
    except ValidationError as error:
        raise UsageError("; ".join(describe(error, "--enqueue"))) from error
    absent = [
        name for name, value in complete_params(spec, params).items()
        if name not in params and not spec.space[name].contains(value)
    ]  # fmt: skip
    if absent:
        raise UsageError(
            f"--enqueue: give {', '.join(absent)} too: the value in [recipe] is outside the study's space"
        )


def shortened(spec: StudySpec) -> StudySpec:
    """The spec of a smoke run: every trial has 2 epochs, and only the first baseline is run."""
    baselines = [
        row.model_copy(update={"params": {k: v for k, v in row.params.items() if k != "epochs"}})
        for row in spec.baselines[:1]
    ]
    return spec.model_copy(
        update={
            "recipe": spec.recipe.model_copy(update={"epochs": SMOKE_EPOCHS}),
            "space": {name: dimension for name, dimension in spec.space.items() if name != "epochs"},
            "baselines": tuple(baselines),
        }
    )
