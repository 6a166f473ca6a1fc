"""What searching costs beside training: a study whose epochs cost nothing."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from caltech_hpo.search.messages import EpochDone, Finished, Job, Ready, WorkerConfig
from caltech_hpo.spec import EpochResult, StudySpec
from caltech_hpo.study_files import load_study

if TYPE_CHECKING:
    import optuna

    from caltech_hpo.search.executors import Executor

STUDY = "alexnet-scratch"  # six hyperparameters, TPE, a median pruner
EPOCHS = 30
LATEST = 100  # trials over which the cost at the end is measured


@dataclass(frozen=True)
class Overhead:
    """Milliseconds a trial of 30 epochs costs: drawing its parameters, 30 reports, asking the pruner, ending.

    Means over the last `measured` trials of a study that then has `trials`: `ours` by the supervisor
    and a worker process that returns made-up epochs at once, `optuna` by Optuna's own storage on a copy
    of the same database. `seconds` is what all of ours took.
    """

    trials: int
    measured: int
    epochs: int
    ours_ms: float
    optuna_ms: float
    seconds: float


def made_up(job: Job) -> Iterator[EpochResult]:
    """Curves that rise with every epoch and every trial, so that none is pruned."""
    for epoch in range(1, job.recipe.epochs + 1):
        yield EpochResult(
            epoch=epoch, learning_rate=job.recipe.learning_rate, training_loss=1 / epoch,
            validation_loss=1 / epoch, validation_top1=0.5 * (1 - 1 / (epoch + 1)) + 1e-6 * job.number,
            images=1, seconds=1e-9,
        )  # fmt: skip


def instant_worker(connection: Connection, config: WorkerConfig | None) -> None:
    """As `worker_main`, without training."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(Ready(device="none", precision="fp32", versions={}))
        while (job := connection.recv()) is not None:
            for result in made_up(job):
                connection.send(EpochDone(job.number, result))
                if not connection.recv():
                    break
            connection.send(Finished(job.number))


def overhead_spec(epochs: int) -> StudySpec:
    """The study, every trial of so many epochs, without hand-tuned rows."""
    declared = load_study(STUDY)
    return declared.model_copy(
        update={
            "recipe": declared.recipe.model_copy(update={"epochs": epochs}),
            "space": {name: dimension for name, dimension in declared.space.items() if name != "epochs"},
            "baselines": (),
        }
    )


def measure_overhead(folder: Path, trials: int, progress: Callable[[int, int], None]) -> Overhead:
    """Searches `trials` made-up trials on a SQLite database in `folder`, where it leaves nothing.

    Both ways run the last trials from the same state, one after the other.
    """
    from caltech_hpo.search.executors import ProcessExecutor
    from caltech_hpo.search.storage import open_storage
    from caltech_hpo.search.urls import default_url

    spec = overhead_spec(EPOCHS)
    measured = min(LATEST, trials)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        home, copy = Path(name), Path(name) / "copy"
        copy.mkdir()
        executor = ProcessExecutor(None, 1, target=instant_worker)
        try:
            storage = open_storage(default_url(home))
            before = _search(storage, spec, executor, trials - measured, progress)
            with sqlite3.connect(home / "studies.db") as ours, sqlite3.connect(copy / "studies.db") as theirs:
                ours.backup(theirs)
            last = _search(storage, spec, executor, trials, progress)
        finally:
            executor.close()
        alone = _optuna_alone(open_storage(default_url(copy)), spec, measured)
    return Overhead(
        trials=trials, measured=measured, epochs=EPOCHS, ours_ms=1000 * last / measured,
        optuna_ms=1000 * alone / measured, seconds=before + last,
    )  # fmt: skip


def _search(
    storage: optuna.storages.RDBStorage, spec: StudySpec, executor: Executor, trials: int,
    progress: Callable[[int, int], None],
) -> float:  # fmt: skip
    """Seconds from the study's being open to its having so many trials."""
    from caltech_hpo.search.events import TrialEnded
    from caltech_hpo.search.space import Binding
    from caltech_hpo.search.storage import open_study
    from caltech_hpo.search.supervisor import Supervisor
    from caltech_hpo.search.write_through import hold

    study = open_study(storage, STUDY, spec, "made up", sampler_seed=0, allow_changed=False)
    binding = Binding(classes=101, data="made up", seed=0, precision="fp32")
    supervisor = Supervisor(*hold(study, storage), spec, executor, binding)
    begin = time.perf_counter()
    for event in supervisor.run(trials):
        if isinstance(event, TrialEnded):
            progress(event.number + 1, trials)
    return time.perf_counter() - begin


def _optuna_alone(storage: optuna.storages.RDBStorage, spec: StudySpec, trials: int) -> float:
    """Seconds for as many trials by Optuna's own calls alone."""
    from caltech_hpo.search.space import Binding, recipe_for, suggest
    from caltech_hpo.search.storage import open_study

    study = open_study(storage, STUDY, spec, "made up", sampler_seed=0, allow_changed=False)
    binding = Binding(classes=101, data="made up", seed=0, precision="fp32")
    begin = time.perf_counter()
    for _ in range(trials):
        trial = study.ask()
        recipe = recipe_for(spec, suggest(trial, spec), binding)
        score = 0.0
        for result in made_up(Job(trial.number, recipe)):
            score = result.validation_top1 or 0.0
            trial.report(score, result.epoch)
            if spec.pruner.warmup_epochs <= result.epoch < EPOCHS:
                trial.should_prune()
        study.tell(trial, score)
    return time.perf_counter() - begin
