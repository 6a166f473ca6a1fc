"""What runs in a worker: recipe in, epoch results out. The only module of the room that knows torch."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection

import torch

from caltech_hpo.data.cache import LabeledImages
from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.search.messages import EpochDone, Failed, Finished, Job, Ready, Refused, WorkerConfig
from caltech_hpo.training.checkpoint import save_weights
from caltech_hpo.training.device import describe_device, resolve_device, resolve_precision
from caltech_hpo.training.loop import model_for, train
from caltech_hpo.training.models import build_model, weights_sha256

PACKAGES = ("caltech-hpo", "torch", "torchvision", "optuna")


@dataclass(frozen=True)
class WorkerContext:
    """What stays open over a worker's jobs."""

    device: torch.device
    training: LabeledImages
    validation: LabeledImages
    ready: Ready


def open_worker(config: WorkerConfig) -> WorkerContext:
    """Opens device and data and reads the weights once. Raises CaltechHpoError."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    build_model(config.architecture, config.weights, len(config.data.classes), seed=0)  # refuses bad weights
    ready = Ready(
        device=describe_device(device),
        precision=resolve_precision("auto", device),
        versions={package: version(package) for package in PACKAGES},
        weights_sha256=weights_sha256(config.weights),
    )
    return WorkerContext(device, config.data.open_training(), config.data.open_validation(), ready)


def run_job(job: Job, context: WorkerContext) -> Generator[EpochDone | Finished | Failed, bool, None]:
    """Trains one recipe: yields each epoch, is sent whether to go on, ends with Finished or Failed."""
    try:
        yield from _epochs(job, context)
    except torch.OutOfMemoryError as error:
        yield Failed(job.number, "out of memory", str(error))
    except CaltechHpoError as error:
        yield Failed(job.number, "refused", str(error))
    except RuntimeError as error:
        # torch's CPU allocator has no exception of its own
        full = "DefaultCPUAllocator" in str(error)
        message = str(error) if full else traceback.format_exc()
        yield Failed(job.number, "out of memory" if full else "bug", message)
    except Exception:
        yield Failed(job.number, "bug", traceback.format_exc())
    if context.device.type == "cuda":
        torch.cuda.empty_cache()


def _epochs(job: Job, context: WorkerContext) -> Generator[EpochDone | Finished | Failed, bool, None]:
    recipe = job.recipe
    both = recipe.fit_on == "train+val"
    training = context.training + context.validation if both else context.training
    model = model_for(recipe, context.device)
    best = -1.0
    for result in train(recipe, model, training, None if both else context.validation, context.device):
        score = result.validation_top1
        improved = result.epoch == recipe.epochs if score is None else score > best
        if improved:
            best = score if score is not None else best
            if job.keep is not None:
                save_weights(model, job.keep)
        go_on = yield EpochDone(job.number, result)
        if not go_on:
            break
    yield Finished(job.number)


def worker_main(connection: Connection, config: WorkerConfig) -> None:
    """A worker process: says Ready or Refused, then runs jobs until the pipe closes or None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the supervisor is gone
        try:
            context = open_worker(config)
        except CaltechHpoError as error:
            connection.send(Refused(error))
            return
        connection.send(context.ready)
        while (job := connection.recv()) is not None:
            events = run_job(job, context)
            event = next(events)
            while isinstance(event, EpochDone):
                connection.send(event)
                event = events.send(connection.recv())
            connection.send(event)
            events.close()
