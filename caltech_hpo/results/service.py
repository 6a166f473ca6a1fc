"""Runs what is in the queue, one search after the other, until it is told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

from caltech_hpo.results.ledger import now
from caltech_hpo.results.work_queue import Submission, change, next_submission, submission
from caltech_hpo.search.request import Place, Say
from caltech_hpo.search.storage import open_storage

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

LOOK_EVERY = 1.0  # seconds
RETRY_AFTER = 30.0  # seconds, where somebody else searches the study
PATIENCE = 100.0  # seconds that a search has to pause, and its workers to end
LOCKED = "is running"  # in the message of a search that finds its study held
STORAGE_EXIT = 4


@dataclass
class Service:
    """`workers` and `device` are the searches'. Their output goes into `place.home`/logs."""

    place: Place
    workers: int
    device: str
    say: Say

    @cached_property
    def storage(self) -> RDBStorage:
        """The database of queue and studies."""
        return open_storage(self.place.storage)

    def run(self, stop: Callable[[], bool]) -> None:
        """Takes one after the other; waits where there is none. The serve lock must be held."""
        storage = self.storage
        not_before: dict[int, float] = {}
        while not stop():
            held = {number for number, when in not_before.items() if time.monotonic() < when}
            found = next_submission(storage, besides=held)
            if found is None:
                time.sleep(LOOK_EVERY)
                continue
            if found.cancel:
                change(storage.engine, found.id, state="cancelled", ended_at=now())
                continue
            change(storage.engine, found.id, state="running", began_at=found.began_at or now(), message="")
            self.say(f"submission {found.id}: search --study {found.study} --trials {found.trials} begins")
            log = self.log_of(found)
            earlier = log.stat().st_size if log.exists() else 0  # bytes of searches before this one
            code, why = self._search(found, stop)
            output = log.read_bytes()[earlier:].decode(errors="replace")
            state, message = outcome(code, why, output)
            ended = now() if state not in ("waiting", "running") else ""
            change(storage.engine, found.id, state=state, message=message, ended_at=ended)
            if state == "waiting":
                not_before[found.id] = time.monotonic() + RETRY_AFTER
            self.say(f"submission {found.id}: {state}{f': {message}' if message else ''}")

    def log_of(self, found: Submission) -> Path:
        """Where the output of its search goes."""
        return self.place.home / "logs" / f"submission-{found.id}.log"

    def _search(self, found: Submission, stop: Callable[[], bool]) -> tuple[int, str]:
        """Runs the search; its exit code, and why we ended it: "stop", "cancel", or "" if it ended itself."""
        why = ""
        command = [
            sys.executable, "-m", "caltech_hpo.cli", "search", f"--study={found.study}",
            f"--trials={found.trials}", f"--workers={self.workers}", f"--device={self.device}",
            f"--home={self.place.home}", *found.options.arguments(),
        ]  # fmt: skip
        # The URL may hold a password: no process list may show it.
        environment = os.environ | {
            "CALTECH_HPO_STORAGE": self.place.storage,
            "CALTECH_HPO_ENDS_WITH": str(os.getpid()),  # killed, we cannot ask it to pause
        }
        with self._log(found) as log, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,  # a Ctrl-C reaches us alone: we pause it
        ) as process:  # fmt: skip
            while process.poll() is None:
                why = "stop" if stop() else "cancel" if submission(self.storage, found.id).cancel else ""
                if why:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(PATIENCE)
                    except subprocess.TimeoutExpired:
                        process.kill()
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_EVERY)
            return process.wait(), why

    @contextlib.contextmanager
    def _log(self, found: Submission) -> Iterator[IO[bytes]]:
        path = self.log_of(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            yield file


def outcome(code: int, why: str, output: str) -> tuple[str, str]:
    """The state that follows a search's end, and what to say of it; `why` as `_search` says."""
    if code == 0:
        return "done", ""
    if why == "cancel":
        return "cancelled", "its trials stay"
    if why == "stop":
        return "running", "paused; goes on when serve does"
    faults = [line for line in output.splitlines() if line.startswith("error: ")]
    message = faults[-1].removeprefix("error: ") if faults else f"ended with exit code {code}"
    if code == STORAGE_EXIT and LOCKED in message:
        return "waiting", message
    return "failed", message
