"""A training step as a CUDA graph: recorded once, replayed by one call where a step makes hundreds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], None]
# Steps before the recording: the first makes the optimizer's state, and cuDNN tries its algorithms in it.
PLAIN_STEPS = 2


class StepGraph:
    """Takes the steps of batches of one shape on a GPU: the first as they are, the others as a graph.

    A step must compute on the GPU alone and change tensors in place. Learning rates stay numbers of the
    optimizer's groups. A graph keeps a step's memory for itself; where recording finds too little of it the
    steps go on as they are.
    """

    def __init__(
        self, step: Step, optimizer: torch.optim.Optimizer, given_up: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        """`step` takes inputs (n, ...) and labels (n, ...) and includes the optimizer's.

        `given_up` is called where a recording found too little memory.
        """
        self._step, self._optimizer, self._given_up = step, optimizer, given_up
        self._plain_steps: float = PLAIN_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed by now."""
        return self._graph is not None

    def __call__(self, inputs: Tensor, labels: Tensor) -> None:
        """The step, with this batch."""
        if self._graph is None and self._plain_steps <= 0:
            self._record(inputs, labels)
        if self._graph is None:
            self._plain_steps -= 1
            self._step(inputs, labels)
            return
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()

    def _record(self, inputs: Tensor, labels: Tensor) -> None:
        self._inputs, self._labels = torch.empty_like(inputs), torch.empty_like(labels)
        self._rates = [torch.zeros((), device=inputs.device) for _ in self._optimizer.param_groups]
        graph = torch.cuda.CUDAGraph()
        # The current device may be another, and work on a stream of another device would not be recorded. A
        # stream of its own: what torch keeps for one stream ends with the first of its graphs.
        stream = torch.cuda.Stream(inputs.device)  # type: ignore[no-untyped-call]
        with contextlib.suppress(torch.OutOfMemoryError):  # then it goes on as it is
            # recording computes nothing: it is the replay that makes this step
            with (
                torch.cuda.device(inputs.device), _rates_from(self._optimizer, self._rates), _nothing_tried(),
                torch.cuda.graph(graph, stream=stream),
            ):  # fmt: skip
                self._step(self._inputs, self._labels)
            self._graph = graph
            return
        self._plain_steps = float("inf")
        del graph, self._inputs, self._labels
        torch.cuda.empty_cache()
        self._given_up()


@contextlib.contextmanager
def _nothing_tried() -> Iterator[None]:
    """cuDNN takes the algorithms that it knows: trying others waits for the GPU, which ends a recording.

    It would where their memory is short, in place of saying so.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def _rates_from(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """The optimizer's steps read their learning rates from tensors: a number would be recorded as it is."""
    groups = optimizer.param_groups
    names: tuple[str, ...] = ("lr", "capturable")
    before = [{name: group[name] for name in names if name in group} for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:  # AdamW asks for it
            group["capturable"] = True
    try:
        yield
    finally:
        for group, values in zip(groups, before, strict=True):
            group.update(values)
