"""Workers on a Ray cluster: the same interface, Ray places them and tells when one's machine is gone."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from caltech_hpo.data.cache import Progress, write_whole
from caltech_hpo.errors import CaltechHpoError, UsageError
from caltech_hpo.search.messages import (
    STARTING,
    Died,
    EpochDone,
    Event,
    Job,
    Measure,
    Midway,
    Ready,
    WorkerConfig,
)
from caltech_hpo.search.relay import Files, Relay
from caltech_hpo.search.request import Cluster

INSTALL = "pip install 'caltech-hpo[ray]'"
RESTARTS = 3  # of an actor before its Ready
READY_WITHIN = 600.0  # seconds: a cluster may have to start machines first
CLOSING = 20.0  # seconds
NODE_LOST = -9  # the exit code that a lost machine's worker is said to have had


def ray_module() -> Any:
    """The ray package. Raises UsageError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray: ray is not installed", INSTALL) from error
    return ray


@dataclass
class _Actor:
    handle: Any = None
    placing: Any = None  # the reference of its `missing`, then of its `start`; None once its worker is ready
    job: Job | Measure | None = None
    waiting: Any = None  # the reference of its next event; None between an epoch and its answer
    losses: int = 0  # in a row, before it was ready


class RayExecutor:
    """Workers as Ray actors; the supervisor's interface is `Executor`'s."""

    def __init__(
        self, config: WorkerConfig, workers: int, cluster: Cluster, mark: Path,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Connects, places the workers, waits until all are ready. Raises UsageError where the cluster
        cannot hold them, and what a worker refuses with.

        `mark` is a file in the supervisor's home, written here and removed by `close`.
        """
        self._ray, self._cluster, self._mark = ray_module(), cluster, mark
        self._token = uuid.uuid4().hex
        self._pixels: dict[Path, Any] = {}
        self._ready_refs: list[Any] = []
        self._actors: list[_Actor] = []
        self._config = _absolute(config)  # actors have a folder of their own
        self._begun = not self._ray.is_initialized()
        if progress:
            progress(STARTING, 0, workers)
        if self._begun:
            self._connect(workers)
        write_whole(mark, self._token.encode())
        try:
            for _ in range(workers):
                self._actors.append(_Actor())
                self._spawn(self._actors[-1])
            for done, actor in enumerate(self._actors, start=1):
                ready = self._ready(actor)
                if done == 1:  # as with processes the first one's
                    self.ready = ready
                if progress:
                    progress(STARTING, done, workers)
        except BaseException:
            self.close()
            raise

    def _connect(self, workers: int) -> None:
        # Its log lines would run through the progress of the search.
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._cluster.address is None:
            options |= {"include_dashboard": False, "num_cpus": max(1, round(workers * self._cluster.cpus))}
        try:
            self._ray.init(address=self._cluster.address, **options)
        except (ConnectionError, ValueError) as error:
            raise UsageError(
                f"--ray-address {self._cluster.address}: {error}",
                "start a cluster ('ray start --head'), or leave --ray-address out to use this machine alone",
            ) from error

    def _spawn(self, actor: _Actor) -> None:
        """Asks Ray for a place; the actor's worker is free once it has one."""
        # Several calls at once: one waits for the next event while others answer, pause or kill.
        remote = self._ray.remote(Relay).options(
            num_gpus=self._cluster.gpus, num_cpus=self._cluster.cpus, max_concurrency=4, max_restarts=0
        )
        actor.handle = remote.remote(self._config, self._mark.absolute(), self._token)
        actor.placing, actor.job, actor.waiting = actor.handle.missing.remote(), None, None

    def _ready(self, actor: _Actor) -> Ready:
        """Waits until its worker is ready."""
        until = time.monotonic() + READY_WITHIN
        while True:
            found, _ = self._ray.wait([actor.placing], timeout=max(0.0, until - time.monotonic()))
            if not found:
                raise UsageError(
                    f"the cluster had no room for a worker within {READY_WITHIN / 60:.0f} minutes "
                    f"({self._cluster.cpus:g} CPUs and {self._cluster.gpus:g} GPUs each)",
                    "use fewer --workers, or smaller shares: --gpus-per-worker, --cpus-per-worker",
                )
            if (ready := self._place(actor)) is not None:
                return ready

    def _place(self, actor: _Actor) -> Ready | None:
        """The next step with an answer that is there; what its worker says once it is ready.

        A worker whose machine is lost meanwhile is placed anew.
        """
        try:
            told: Ready | list[Path] = self._ray.get(actor.placing)
        except self._ray.exceptions.RayActorError:
            actor.losses += 1
            if actor.losses == RESTARTS:
                raise CaltechHpoError(
                    f"a worker's machine was lost {RESTARTS} times before it was ready",
                    "look at 'ray status'",
                ) from None
            self._spawn(actor)
            return None
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, CaltechHpoError) else error from None
        if isinstance(told, Ready):
            actor.placing, actor.losses = None, 0
            return told
        contents = [self._put(path) for path in told]  # references: Ray fetches what they mean
        actor.placing = actor.handle.start.remote(told, *contents)
        return None

    def _put(self, path: Path) -> Any:
        """The file in the object store, once for all machines."""
        if path not in self._pixels:
            self._pixels[path] = self._ray.put(path.read_bytes())
        return self._pixels[path]

    @property
    def free(self) -> int:
        """Workers without a job."""
        return sum(actor.job is None and actor.placing is None for actor in self._actors)

    def submit(self, job: Job | Measure) -> None:
        """Sends the job, with its checkpoint, to the first free worker."""
        actor = next(actor for actor in self._actors if actor.job is None and actor.placing is None)
        files: Files = {}
        if isinstance(job, Job):
            keep, checkpoint = (path and path.absolute() for path in (job.keep, job.checkpoint))
            job = replace(job, keep=keep, checkpoint=checkpoint)
            if checkpoint is not None and checkpoint.exists():
                files[checkpoint] = checkpoint.read_bytes()
        actor.job = job
        actor.waiting = actor.handle.submit.remote(job, files)

    def event_within(self, seconds: float) -> bool:
        """Whether a worker with a job speaks, or is lost, within so many seconds."""
        until = time.monotonic() + seconds
        while not self._ready_refs:
            placing = {actor.placing: actor for actor in self._actors if actor.placing is not None}
            waiting = [actor.waiting for actor in self._actors if actor.waiting is not None]
            found, _ = self._ray.wait(
                [*waiting, *placing], num_returns=1, timeout=max(0.0, until - time.monotonic()),
                fetch_local=False,
            ) if waiting or placing else ([], [])  # fmt: skip
            if not found:
                break
            for reference in found:
                if reference in placing:
                    self._place(placing[reference])
                else:
                    self._ready_refs.append(reference)
        return bool(self._ready_refs)

    @overload
    def next_event(self) -> Event: ...

    @overload
    def next_event(self, seconds: float) -> Event | None: ...

    def next_event(self, seconds: float | None = None) -> Event | None:
        """The next event; the files that come with it are on disk before it is returned."""
        if not self.event_within(3600.0 if seconds is None else seconds):
            return None if seconds is not None else self.next_event()
        reference = self._ready_refs.pop(0)
        actor = next(actor for actor in self._actors if actor.waiting == reference)
        assert actor.job is not None
        number, actor.waiting = actor.job.number, None
        try:
            event, files = self._ray.get(reference)
        except self._ray.exceptions.RayActorError:
            self._spawn(actor)
            return Died(number, NODE_LOST)
        for path, content in files.items():
            write_whole(path, content)
        if isinstance(event, Midway):
            actor.waiting = actor.handle.next_event.remote()
        elif not isinstance(event, EpochDone):
            actor.job = None
        told: Event = event
        return told

    def answer(self, job: int, go_on: bool) -> None:
        """Sends the decision to the job's worker."""
        for actor in self._of(job):
            actor.waiting = actor.handle.answer.remote(job, go_on)

    def pause(self) -> None:
        """Asks all that have a job."""
        for actor in self._actors:
            if actor.job is not None:
                actor.handle.pause.remote()

    def kill(self, job: int) -> None:
        """Ends the job's worker process; `next_event` will say Died."""
        for actor in self._of(job):
            actor.handle.kill.remote(job)

    def _of(self, job: int) -> Iterator[_Actor]:
        return (actor for actor in self._actors if actor.job is not None and actor.job.number == job)

    def close(self) -> None:
        """Ends the workers, and the connection where it was made here."""
        closing = [actor.handle.close.remote() for actor in self._actors if actor.placing is None]
        with contextlib.suppress(Exception):  # a machine may be gone
            self._ray.wait(closing, num_returns=len(closing), timeout=CLOSING)
        for actor in self._actors:
            if actor.handle is not None:
                self._ray.kill(actor.handle)
        self._actors = []
        self._mark.unlink(missing_ok=True)
        if self._begun:
            self._ray.shutdown()


def _absolute(config: WorkerConfig) -> WorkerConfig:
    """The same with absolute paths."""
    data = replace(
        config.data, training_cache=config.data.training_cache.absolute(),
        validation_cache=config.data.validation_cache.absolute(),
    )  # fmt: skip
    return replace(config, data=data, features=config.features and config.features.absolute())
