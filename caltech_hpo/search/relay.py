"""What a Ray actor does: one local worker process, between which and the supervisor it passes everything on.

Files go along. An actor that does not see the supervisor's folders gets pixels and checkpoints through Ray's
object store, and hands new checkpoints and weights back with the next event, so that a trial goes on
elsewhere when its machine dies.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from caltech_hpo.data.cache import write_whole
from caltech_hpo.search.executors import ProcessExecutor
from caltech_hpo.search.messages import Event, Job, Measure, Ready, WorkerConfig

Files = dict[Path, bytes]
Told = tuple[Event, Files]


class Relay:
    """A worker process of its own, and the files that it needs and makes.

    `mark` is a file that the supervisor has written with `token` in it: where it is seen, its folders are
    shared and files need not travel.
    """

    def __init__(self, config: WorkerConfig, mark: Path, token: str) -> None:
        self._shared = _reads(mark, token)
        self._scratch = Path(tempfile.mkdtemp(prefix="caltech-hpo-"))
        self._config = config
        self._executor: ProcessExecutor | None = None
        self._sent: dict[Path, tuple[int, int]] = {}
        self._job: Job | Measure | None = None

    def missing(self) -> list[Path]:
        """The caches of pixels that this machine does not have."""
        if self._shared:
            return []
        data = self._config.data
        return [
            path for path in (data.training_cache, data.validation_cache) if not self._local(path).exists()
        ]

    def start(self, missing: list[Path], *contents: bytes) -> Ready:
        """Starts the worker process with the caches that were missing. Raises what a worker refuses with."""
        for path, content in zip(missing, contents, strict=True):
            write_whole(self._local(path), content)
        config = self._config
        if not self._shared:
            data = replace(
                config.data, training_cache=self._local(config.data.training_cache),
                validation_cache=self._local(config.data.validation_cache),
            )  # fmt: skip
            features = None if config.features is None else self._scratch / "features"
            config = replace(config, data=data, features=features)
        self._executor = ProcessExecutor(config, 1)
        return self._executor.ready

    def submit(self, job: Job | Measure, files: Files) -> Told:
        """Gives the job to the process and waits for its first event; `files` are its checkpoint's."""
        self._job, self._sent = job, {}
        if isinstance(job, Job) and not self._shared:
            shutil.rmtree(self._scratch / "job", ignore_errors=True)
            for path, content in files.items():
                write_whole(self._of_job(path), content)
                self._sent[path] = _stamp(self._of_job(path))
            job = replace(
                job, keep=job.keep and self._of_job(job.keep),
                checkpoint=job.checkpoint and self._of_job(job.checkpoint),
            )  # fmt: skip
        self._process.submit(job)
        return self.next_event()

    def next_event(self) -> Told:
        """Waits for the process's next event; with it come the files that are new."""
        event = self._process.next_event()
        return event, self._new_files()

    def answer(self, job: int, go_on: bool) -> Told:
        """As `Executor.answer`; waits for the next event."""
        self._process.answer(job, go_on)
        return self.next_event()

    def pause(self) -> None:
        """As `Executor.pause`."""
        self._process.pause()

    def kill(self, job: int) -> None:
        """As `Executor.kill`."""
        self._process.kill(job)

    def close(self) -> None:
        """Ends the process and removes what it left."""
        if self._executor is not None:
            self._executor.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _process(self) -> ProcessExecutor:
        assert self._executor is not None, "start comes first"
        return self._executor

    def _local(self, path: Path) -> Path:
        return path if self._shared else Path(tempfile.gettempdir()) / "caltech-hpo-pixels" / path.name

    def _of_job(self, path: Path) -> Path:
        return self._scratch / "job" / path.name

    def _new_files(self) -> Files:
        if self._shared or not isinstance(self._job, Job):
            return {}
        found = {}
        for path in (self._job.checkpoint, self._job.keep):
            if path is None:
                continue
            here = self._of_job(path)
            # not there yet, or replaced in this instant: then with the next event
            with contextlib.suppress(FileNotFoundError):
                stamp = _stamp(here)
                if self._sent.get(path) != stamp:
                    found[path] = here.read_bytes()
                    self._sent[path] = stamp
        return found


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def _reads(mark: Path, token: str) -> bool:
    with contextlib.suppress(OSError):
        return mark.read_text(encoding="utf-8") == token
    return False
