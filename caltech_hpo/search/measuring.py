"""A worker's timing of a few steps of each kind of training, for a forecast."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING

from caltech_hpo.search.messages import Measure, Measured, Working
from caltech_hpo.timings import StepTime
from caltech_hpo.training.system_memory import is_out_of_memory, peak_memory, release_freed_memory
from caltech_hpo.training.timing import time_steps

if TYPE_CHECKING:
    from caltech_hpo.search.worker import WorkerContext


def measure(job: Measure, context: WorkerContext) -> Generator[Working | Measured, bool, None]:
    """Times the recipes until the job's seconds are over, the first one in any case; ends with Measured.

    Those that find no memory are left out.
    """
    started = time.monotonic()
    times: list[StepTime] = []
    elapsed: list[float] = []
    peak, problem = 0, ""
    for number, recipe in enumerate(job.recipes):
        if times and time.monotonic() - started > job.seconds:
            break
        yield Working(job.number, "timing steps", number, len(job.recipes))
        try:
            times.append(
                time_steps(
                    recipe, context.training, context.validation, context.device, context.memory,
                    features=context.features is not None,
                )
            )  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0]
        if problem and context.device.type == "cuda":
            release_freed_memory(context.device)
        peak = max(peak, context.memory.peak, peak_memory(context.device))
        elapsed.append(time.monotonic() - started)
    yield Measured(job.number, tuple(times), peak, problem, tuple(elapsed))
