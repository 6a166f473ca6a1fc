"""What `final` and `confirm` share: the data that was searched on, trainings side by side, how one fails."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.dataset import DatasetIndex, scan
from caltech_hpo.data.loading import SearchData
from caltech_hpo.errors import CaltechHpoError, DataError
from caltech_hpo.search.changes import DATA_ATTR, study_spec
from caltech_hpo.search.messages import (
    Died,
    EpochDone,
    Failed,
    Finished,
    Job,
    Paused,
    Underway,
    WorkerBugError,
    Working,
)
from caltech_hpo.search.request import Place, Say, silent
from caltech_hpo.search.run import locate_data
from caltech_hpo.search.running import MOST_DEATHS
from caltech_hpo.spec import EpochResult, Recipe
from caltech_hpo.training.checkpoint_files import has_checkpoint

if TYPE_CHECKING:
    import optuna

    from caltech_hpo.search.executors import Executor


SEEDS = 2**32  # how many there are: after the last one comes 0


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe on another seed, which is taken modulo 2**32."""
    return recipe.model_copy(update={"seed": seed % SEEDS})


def searched_data(
    study: optuna.Study, place: Place, *, progress: Progress | None = None, say: Say = silent
) -> DatasetIndex:
    """The data set of a study, by name. Raises DataError if it is absent or not the one searched on."""
    spec = study_spec(study)
    index = scan(locate_data(spec, place, progress=progress, say=say))
    if index.fingerprint != study.user_attrs[DATA_ATTR]:
        raise DataError(
            f"{index.root}: not the data that study '{study.study_name}' searched on "
            "(other images, classes or split)",
            "give the same folder as for the search: --data DIR",
        )
    return index


def require_same_images(recipe: Recipe, data: SearchData, index: DatasetIndex) -> None:
    """Raises DataError if other images cannot be read than when the trial was trained.

    The same hash would stand for another training.
    """
    if data.fingerprint != recipe.data:
        raise DataError(
            f"{index.root}: more or fewer images can be read than when the trial was trained",
            "put the files back as they were for the search",
        )


@dataclass(frozen=True)
class Began:
    """A worker has a job; `resumed`: it goes on from a checkpoint, the epochs before it come again.

    `lost`: the job had begun, but its worker was killed.
    """

    job: int
    resumed: bool
    lost: bool = False


@dataclass(frozen=True)
class Trained:
    """A job is done; all of its epochs."""

    job: int
    results: tuple[EpochResult, ...]


@dataclass
class _Running:
    job: Job
    results: list[EpochResult] = field(default_factory=list)
    deaths: int = 0


def always(_: Sequence[EpochResult]) -> bool:
    """Every epoch is followed by the next."""
    return True


def train_each(
    jobs: Sequence[Job], executor: Executor, *, go_on: Callable[[Sequence[EpochResult]], bool] = always,
    progress: Progress | None = None,
) -> Generator[Began | Underway | EpochDone | Trained, None, None]:  # fmt: skip
    """Runs the jobs in their order on all workers; `go_on` is asked after each epoch of one.

    One whose worker died goes on from its checkpoint. Raises what `training_failure` makes of one that
    fails; the others then stop where they are, with a checkpoint.
    """
    waiting, running = list(jobs), dict[int, _Running]()
    while waiting or running:
        while waiting and executor.free:
            job = waiting.pop(0)
            running[job.number] = _Running(job)
            yield Began(job.number, _has_checkpoint(job))
            executor.submit(job)
        event = executor.next_event()
        one = running[event.job]
        if isinstance(event, EpochDone):
            one.results.append(event.result)
            executor.answer(event.job, go_on(one.results))
            yield event
        elif isinstance(event, Underway):
            yield event
        elif isinstance(event, Working):
            if progress:
                progress(event.what, event.done, event.total)
        elif isinstance(event, Finished):
            del running[event.job]
            yield Trained(event.job, tuple(one.results))
        elif isinstance(event, (Died, Paused)) and one.deaths + 1 < MOST_DEATHS:
            one.deaths += 1
            yield Began(event.job, _has_checkpoint(one.job), lost=True)
            executor.submit(replace(one.job, known=len(one.results)))
        elif isinstance(event, (Failed, Died, Paused)):
            raise training_failure(event)


def _has_checkpoint(job: Job) -> bool:
    return job.checkpoint is not None and has_checkpoint(job.checkpoint)


def training_failure(event: Failed | Died | Paused) -> Exception:
    """What a training that did not finish raises: a bug is a bug, the rest is the user's to mend."""
    if isinstance(event, Paused):
        return CaltechHpoError("training failed: its worker was asked to end", "run the command again")
    if isinstance(event, Died):
        return CaltechHpoError(f"training failed: {event.reason}", "run the command again")
    if event.kind == "bug":
        return WorkerBugError(event.message)
    fix = "mend that and run it again"
    if event.kind == "out of memory":
        fix = "use fewer --workers, more --memory, or end what else takes it; then run it again: it goes on"
    return CaltechHpoError(f"training failed: {event.kind}: {event.message}", fix)
