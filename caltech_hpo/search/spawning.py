"""A worker's process: how it is started, and what it inherits."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from caltech_hpo.search.messages import WorkerConfig

# glibc returns every freed activation (tens of MB each) to the system and faults it in again at the
# next step. Keeping freed memory, in huge pages, made an AlexNet step on a CPU 1.25 times as fast.
GLIBC_TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
)
HELD_BACK = (signal.SIGINT, signal.SIGTERM)  # while a process starts
Target = Callable[[Connection, Any], None]
Early = list[tuple[SpawnProcess, Connection]]


def spawn(target: Target, config: WorkerConfig | None) -> tuple[SpawnProcess, Connection]:
    """A new process that runs `target`, and our end of its pipe, which closes when the process dies.

    It shares nothing with this one: forking after torch's threads have run hangs the child.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, config), daemon=True)
    with worker_environment():
        process.start()
    theirs.close()
    return process, ours


@contextlib.contextmanager
def started_early(workers: int) -> Iterator[Early]:
    """Workers that import what they need and wait for their config; those that nobody takes are ended."""
    started: Early = []
    try:
        for _ in range(workers):
            started.append(spawn(run_worker, None))
        yield started
    finally:
        dismiss(started, keep=0)


def dismiss(started: Early, *, keep: int) -> None:
    """Ends all but so many of them."""
    surplus = started[keep:]
    del started[keep:]
    for process, _ in surplus:
        process.kill()
    for process, connection in surplus:
        process.join()
        connection.close()


def run_worker(connection: Connection, config: WorkerConfig | None) -> None:
    """`worker_main`, imported where it runs: the supervisor needs no torch. A config of None is sent later.

    Importing torch and torchvision makes 330,000 objects that stay. Looking for garbage among them took a
    fifth of a worker's start, taking them all apart at its end another fifth (n = 4): nothing is collected
    until the worker is ready, and it ends at once. What it writes is on the disk when it says so.
    """
    gc.disable()
    from caltech_hpo.search.worker import worker_main

    with contextlib.suppress(EOFError):  # nobody takes it any more
        worker_main(connection, config or connection.recv())
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def worker_environment(*, tuned: bool = True) -> Iterator[None]:
    """What a child inherits: Ctrl-C blocked from its first instant, and if `tuned` the allocator settings.

    One that comes meanwhile, or a SIGTERM, reaches this process when it has started the child.
    """
    resource_tracker.ensure_running()  # which would unblock it
    with _interrupted_later():
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        before = os.environ.get("GLIBC_TUNABLES")
        if tuned and sys.platform == "linux" and before is None:
            os.environ["GLIBC_TUNABLES"] = GLIBC_TUNABLES
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("GLIBC_TUNABLES", None)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the end, also those that reach another thread (of a library's)."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that one can be interrupted
        yield
        return
    before = {number: signal.signal(number, lambda got, _: came.append(got)) for number in HELD_BACK}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for got in came:
            signal.raise_signal(got)
