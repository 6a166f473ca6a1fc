"""What runs in a worker: recipe in, epoch results out. The only module of the room that knows torch."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.search.line import GONE, Line
from caltech_hpo.search.measuring import measure
from caltech_hpo.search.messages import (
    EpochDone,
    Failed,
    Finished,
    Job,
    Measure,
    Measured,
    Paused,
    Ready,
    Refused,
    Underway,
    WorkerConfig,
    Working,
)
from caltech_hpo.search.underway import TELL_EVERY, nobody, telling
from caltech_hpo.spec import EpochResult
from caltech_hpo.training.best import BestWeights
from caltech_hpo.training.checkpoint import load_checkpoint, save_checkpoint
from caltech_hpo.training.device import (
    describe_device,
    keep_near,
    resolve_device,
    resolve_precision,
    versions,
)
from caltech_hpo.training.features import Split
from caltech_hpo.training.loop import never, train
from caltech_hpo.training.memory import MicroBatches, in_pieces_of
from caltech_hpo.training.models import check_model
from caltech_hpo.training.prepare import Prepared, prepare
from caltech_hpo.training.state import TrainingState, begin, captured, changing, restore
from caltech_hpo.training.system_memory import (
    is_out_of_memory,
    keep_freed_memory,
    memory_share,
    release_freed_memory,
)
from caltech_hpo.training.trained import DESCRIPTION, describe_model
from caltech_hpo.training.weights import weights_sha256

JobEvent = Working | EpochDone | Finished | Paused | Measured | Failed
# Between progress messages of one job, in parts of the whole.
PROGRESS_STEPS = 50
CHECKPOINT_EVERY = 60.0  # seconds; at the end of an epoch
CHEAP = 1.2  # seconds: what takes longer to write is written less often, in a fiftieth of the time at most


@dataclass(frozen=True)
class WorkerContext:
    """What stays open over a worker's jobs."""

    device: torch.device
    training: Split
    validation: Split
    features: Path | None
    memory: MicroBatches
    ready: Ready
    classes: tuple[str, ...]


def open_worker(config: WorkerConfig) -> WorkerContext:
    """Opens device and data and reads the weights once. Raises CaltechHpoError."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    keep_freed_memory(device)
    recipe, data = config.recipe, config.data
    check_model(recipe, len(data.classes))
    ready = Ready(
        device=describe_device(device),
        precision=resolve_precision("auto", device),
        versions=versions(),
        weights_sha256=weights_sha256(recipe.weights, recipe.architecture),
    )
    allowed = None if config.memory is None else config.memory // config.workers
    training, validation = keep_near(device, data.open_training(), data.open_validation(), allowed=allowed)
    return WorkerContext(
        device,
        Split(((training, data.training_cache.stem),)),
        Split(((validation, data.validation_cache.stem),)),
        config.features,
        MicroBatches(device, memory_share(device, allowed, config.workers)),
        ready,
        data.classes,
    )


def run_job(
    job: Job | Measure, context: WorkerContext, interrupted: Callable[[], bool] = never,
    tell: Callable[[Underway], None] = nobody,
) -> Generator[JobEvent, bool, None]:  # fmt: skip
    """Trains one recipe: yields each epoch, is sent whether to go on, ends with Finished, Paused or Failed.

    `Working` takes no answer. A Measure ends with Measured or Failed. Once `interrupted` says True, the
    training stops after its batch, saves where it is, and is Paused. In mid-epoch `tell` hears where it is.
    """
    failed: Failed | None = None
    try:
        if isinstance(job, Job):
            yield from _epochs(job, context, interrupted, tell)
        else:
            yield from measure(job, context)
    except CaltechHpoError as error:
        failed = Failed(job.number, "refused", str(error))
    except Exception as error:
        full = is_out_of_memory(error)
        message = str(error) if full else traceback.format_exc()
        failed = Failed(job.number, "out of memory" if full else "bug", message)
    finally:  # the generator is closed at its last event
        if context.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # after some faults CUDA answers nothing any more
                release_freed_memory(context.device)
    if failed:  # not in the handlers, where the error's traceback holds the training's memory
        yield failed


def _epochs(
    job: Job, context: WorkerContext, interrupted: Callable[[], bool], tell: Callable[[Underway], None]
) -> Generator[JobEvent, bool, None]:
    while True:
        prepared = yield from _prepared(job, context)
        state = begin(job.recipe, prepared)
        state.best = BestWeights(job.above) if job.keep else None
        found = load_checkpoint(job.checkpoint) if job.checkpoint else None
        if found is not None and job.goes_on_from(found[1]):
            prepared = in_pieces_of(prepared, job.recipe, found[1]["micro_batch"])
            restore(state, job.recipe, prepared, *found)
        del found  # its tensors keep the file open
        before = list(state.results)
        asked = telling(job.number, state, sum(prepared.training.sizes), interrupted, tell)
        results = train(job.recipe, prepared, state, interrupted=asked)
        began = time.monotonic()
        try:
            first = next(results, None)
        except RuntimeError as error:
            # Others may have taken memory since it was looked at: once more, fewer images at a time.
            if not is_out_of_memory(error) or not context.memory.shrink(job.recipe, prepared):
                raise
        else:
            new = itertools.chain([first] if first else [], results)
            yield from _report(job, context, prepared, state, before, new, began)
            return
        del prepared, state, results, asked  # they and the next ones would not fit together
        release_freed_memory(context.device)


def _prepared(job: Job, context: WorkerContext) -> Generator[JobEvent, bool, Prepared]:
    """Features computed, weights loaded, images at a time chosen."""
    training: Split = context.training
    validation: Split | None = context.validation
    if job.recipe.fit_on == "train+val":
        training, validation = Split(training.parts + context.validation.parts), None
    prepared, shown, told = None, ("", -1), 0.0
    for step in prepare(job.recipe, training, validation, context.device, features=context.features):
        if isinstance(step, Prepared):
            prepared = step
        elif (now := (step[0], PROGRESS_STEPS * step[1] // step[2])) != shown or (
            time.monotonic() - told >= TELL_EVERY
        ):
            shown, told = now, time.monotonic()
            yield Working(job.number, *step)
    assert prepared is not None, "prepare ends with it"
    return context.memory.fit(job.recipe, prepared)


def _report(
    job: Job, context: WorkerContext, prepared: Prepared, state: TrainingState, before: list[EpochResult],
    results: Iterable[EpochResult], saved: float,
) -> Generator[JobEvent, bool, None]:  # fmt: skip
    """Yields the epochs that are not known, stops when told to; those `before` come from the checkpoint."""
    every = CHECKPOINT_EVERY
    for new, result in itertools.chain(((False, r) for r in before), ((True, r) for r in results)):
        if state.best and new:
            state.best.offer(changing(prepared.model), result, last=result.epoch == job.recipe.epochs)
        if result.epoch > job.known and not (yield EpochDone(job.number, result, not new)):
            yield Finished(job.number)
            return
        if new and job.checkpoint and (began := time.monotonic()) - saved >= every:
            yield from _written(job, job.checkpoint, "a checkpoint", partial(_save, job, prepared, state))
            saved = time.monotonic()
            every = CHECKPOINT_EVERY * max(1.0, (saved - began) / CHEAP)
    if state.epoch > job.recipe.epochs:
        if state.best and state.best.tensors and job.keep:
            about = {DESCRIPTION: json.dumps(describe_model(job.recipe, context.classes))}
            save = partial(state.best.save, prepared.model, job.keep, about)
            yield from _written(job, job.keep, "the best weights", save)
        if job.checkpoint and job.checkpoint_at_end:
            yield from _written(job, job.checkpoint, "a checkpoint", partial(_save, job, prepared, state))
        yield Finished(job.number)
        return
    if job.checkpoint:
        yield from _written(job, job.checkpoint, "a checkpoint", partial(_save, job, prepared, state))
    yield Paused(job.number)


def _save(job: Job, prepared: Prepared, state: TrainingState) -> None:
    """Writes the job's checkpoint, as it stands now."""
    assert job.checkpoint is not None
    with captured(state, prepared) as (tensors, document):
        save_checkpoint(job.checkpoint, tensors, {"recipe": job.recipe.hash, **document})


def _written(job: Job, path: Path, what: str, write: Callable[[], None]) -> Iterator[Working]:
    """Writes a file; where that fails (no room, mostly) says so; what was there stays, the job goes on."""
    try:
        write()
    except OSError as error:
        yield Working(job.number, f"{path.parent}: {error.strerror or error}: {what} is not written", 0, 1)


def worker_main(connection: Connection, config: WorkerConfig) -> None:
    """A worker process: says Ready or Refused, then runs jobs until the pipe closes or None comes.

    A message in mid-job, the pipe's end or SIGTERM pause the job; after SIGTERM the process ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    line = Line(connection)
    signal.signal(signal.SIGTERM, lambda *_: line.terminated.set())
    with contextlib.suppress(*GONE):
        try:
            context = open_worker(config)
        except CaltechHpoError as error:
            connection.send(Refused(error))
            return
        gc.freeze()  # what was imported
        gc.enable()
        connection.send(context.ready)
        while (job := line.next_job()) is not None:
            events = run_job(job, context, line.interrupted, line.tell)
            event = next(events)
            while isinstance(event, (EpochDone, Working)):
                if isinstance(event, EpochDone):
                    event = events.send(line.decision(event))
                else:
                    connection.send(event)
                    event = next(events)
            connection.send(event)
            events.close()
