"""Stock, ours and the floor side by side: two processes that measure in turns, so that neither disturbs."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

from caltech_hpo.data.dataset import DatasetIndex
from caltech_hpo.data.loading import SearchData, readable
from caltech_hpo.search.request import Say, silent
from caltech_hpo.search.spawning import worker_environment
from caltech_hpo.spec import Hyperparameters, Recipe

if TYPE_CHECKING:
    from caltech_hpo.training.batch_timing import Timing
    from caltech_hpo.training.bench import BenchTask, Phase, Way

# (what is being measured, how many measurements are done, how many there are)
Progress = Callable[[str, int, int], None]
WAYS: tuple[tuple[Way, Phase], ...] = (
    ("stock", "train"), ("ours", "train"), ("ours", "floor train"),
    ("stock", "eval"), ("ours", "eval"), ("ours", "floor eval"),
)  # fmt: skip
BATCH_SIZES = (256, 128, 64, 32, 16)
# Of the machine's memory, for stock's fp32 training; its workers decode beside it, ours trains beside it.
STOCK_SHARE, STOCK_SHARE_OF_A_GPU = 0.25, 0.2


@dataclass(frozen=True)
class Speed:
    """Images a second of one phase: training, evaluation, or a training and validation epoch as a whole.

    Medians over `rounds` measurements, each stretched to an epoch of the whole data. None where its process
    ended before, for lack of memory mostly. `data_wait_s` is what our steps waited for batches in an epoch.
    """

    model: str
    phase: str
    stock: float | None
    ours: float | None
    floor: float | None
    data_wait_s: float | None
    batch_size: int
    device: str
    rounds: int

    @property
    def over_stock(self) -> float | None:
        """Ours / stock."""
        return None if self.ours is None or self.stock is None else self.ours / self.stock

    @property
    def of_floor(self) -> float | None:
        """Ours / floor."""
        return None if self.ours is None or self.floor is None else self.ours / self.floor


def bench_recipe(values: Hyperparameters, data: SearchData) -> Recipe:
    """The recipe that is measured. Weights make no difference to speed: they stay random."""
    given = values.model_dump() | {"weights": "none", "learning_rate": 1e-4, "epochs": 1, "schedule": "step"}
    return Recipe.model_validate(given | {"classes": len(data.classes), "data": data.fingerprint})


def fitting_batch_size(architecture: str, crop: int, device: str) -> int:
    """The largest usual batch with which stock's fp32 training fits the memory."""
    from caltech_hpo.training.device import resolve_device
    from caltech_hpo.training.summary import summarize
    from caltech_hpo.training.system_memory import free_memory

    found = resolve_device(device)
    room = (STOCK_SHARE_OF_A_GPU if found.type == "cuda" else STOCK_SHARE) * free_memory(found)
    image = summarize(architecture, crop=crop).activation_bytes
    return next((size for size in BATCH_SIZES if size * image <= room), BATCH_SIZES[-1])


def measure_speed(
    recipe: Recipe, device: str, data: SearchData, index: DatasetIndex, *, seconds: float, rounds: int,
    progress: Progress, say: Say = silent,
) -> Iterator[Speed]:  # fmt: skip
    """Trains and evaluates for `seconds` a measurement; a short round before the others warms up.

    Says which way cannot go on. Interrupted, it yields what the whole rounds until then say, then raises.
    """
    from caltech_hpo.training.bench import BenchTask

    training, validation = (
        tuple((index.root / sample.path, sample.label) for sample in readable(part, cache))
        for part, cache in (
            (index.training, data.training_cache), (index.validation, data.validation_cache),
        )
    )  # fmt: skip
    task = BenchTask(recipe, device, data, training, validation)
    images = {"train": len(training), "eval": len(validation)}
    found: dict[tuple[Way, Phase], list[Timing]] = {key: [] for key in WAYS}
    total = (rounds + 1) * len(WAYS)
    with _measuring(task, "stock", say) as stock, _measuring(task, "ours", say) as ours:
        sides = {"stock": stock, "ours": ours}
        try:
            progress(f"measuring {recipe.architecture}", 0, total)
            stock.wait()
            ours.wait()
            for step in range(total):
                way, phase = WAYS[step % len(WAYS)]
                warming = step < len(WAYS)
                if warming and way == "stock" and device.startswith("cuda"):
                    continue  # its epochs are as long as they are, and it warms up before each
                timing = sides[way].measure(phase, 0.0 if warming else seconds)
                if timing is not None and not warming:
                    found[way, phase].append(timing)
                progress(f"measuring {recipe.architecture}", step + 1, total)
        except (KeyboardInterrupt, SystemExit):
            whole = min(map(len, found.values()))
            if whole:
                yield from _speeds(recipe, device, whole, found, images)
            raise
    whole = min(filter(None, map(len, found.values())), default=0)  # a way may have ended midway
    yield from _speeds(recipe, device, whole, found, images)


def _speeds(
    recipe: Recipe, device: str, rounds: int, found: dict[tuple[Way, Phase], list[Timing]],
    images: dict[str, int],
) -> Iterator[Speed]:  # fmt: skip
    """The rows, from the seconds that a phase takes over all of its images."""
    seconds: dict[tuple[str, str], float | None] = {}
    waits: dict[str, float | None] = {}
    for (way, asked), timings in found.items():
        column, phase = (way, asked) if not asked.startswith("floor ") else ("floor", asked[len("floor ") :])
        count = images[phase]
        seconds[column, phase] = _median([timing.epoch(count) for timing in timings])
        if column == "ours":
            waits[phase] = _median([timing.wait * count / timing.images for timing in timings])
    for column in ("stock", "ours", "floor"):
        seconds[column, "epoch"] = _total(seconds[column, "train"], seconds[column, "eval"])
    waits["epoch"] = _total(waits["train"], waits["eval"])
    for phase, count in (*images.items(), ("epoch", sum(images.values()))):
        rates = {
            column: None if (taken := seconds[column, phase]) is None else count / taken
            for column in ("stock", "ours", "floor")
        }
        yield Speed(
            model=recipe.architecture, phase=phase, data_wait_s=waits[phase], batch_size=recipe.batch_size,
            device=device, rounds=rounds, **rates,
        )  # fmt: skip


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _total(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


class _Side:
    """One of the two processes; measures nothing any more once its memory did not suffice."""

    def __init__(self, name: str, process: SpawnProcess, connection: Connection, say: Say) -> None:
        self._name, self._process, self._say = name, process, say
        self._connection, self.problem = connection, ""

    def wait(self) -> None:
        """Until the process is ready."""
        self._receive()

    def measure(self, phase: Phase, seconds: float) -> Timing | None:
        if self.problem:
            return None
        with contextlib.suppress(OSError):  # its process has ended: `_receive` says so
            self._connection.send((phase, seconds))
        timing: Timing | None = self._receive()
        return timing

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except (EOFError, OSError):  # the system ends a process that takes too much memory
            self._process.join()
            message = f"its process ended with exit code {self._process.exitcode}"
        if isinstance(message, str):
            self.problem = message
            self._say(f"{self._name}: {message}")
            return None
        return message


@contextmanager
def _measuring(task: BenchTask, way: Way, say: Say) -> Iterator[_Side]:
    from caltech_hpo.training.bench import bench_worker

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # not a daemon: stock's loader has processes of its own
    process = context.Process(target=bench_worker, args=(theirs,))
    try:
        with worker_environment(tuned=way == "ours"):
            process.start()
        theirs.close()
        ours.send((task, way))  # not with the process: its start would wait until it is read
        side = _Side(f"{task.recipe.architecture}, {way}", process, ours, say)
        yield side
        if not side.problem:
            ours.send(None)
            process.join(timeout=10)
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        ours.close()
