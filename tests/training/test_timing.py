"""A step's time is that of a step like those of an hour later."""

from __future__ import annotations

import pytest
import torch

from caltech_hpo.training import timing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def steady(durations, device, monkeypatch, warming=1, enough=timing.TRAINING):
    """What is found of steps that take so long, and how many were taken."""
    now, left = [0.0], iter(durations)
    taken = []

    def step():
        taken.append(next(left))
        now[0] += taken[-1]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    seconds, spread = timing._steady(step, device, warming, enough)
    assert seconds / spread == pytest.approx(min(taken[len(taken) // 2 :]) if device == CPU else seconds)
    return pytest.approx(seconds), len(taken)


@pytest.mark.parametrize(
    ("durations", "expected"),
    [
        ([1.20, 0.57, 0.54, 0.37, 0.36, 9], (0.37, 5)),  # AlexNet's first steps in a process
        ([1.9, 1.7, 1.6, 1.5, 9], (1.5, 4)),
        ([0.1] + [0.02] * 6 + [0.5] + [0.02] * 9, (0.02, 12)),  # fast ones: many; another program's pause
        ([0.1] + [0.06] * 8 + [0.05, 0.06, 0.06, 9], (0.06, 12)),  # nor is the fastest one like the others
        ([4.6, 2.1, 2.0, 9], (2.0, 3)),  # slow ones: the first is not like the others
        ([9.0, 5.0, 9], (5.0, 2)),
        ([70.0, 60.0, 9], (60.0, 2)),
    ],
)
def test_on_a_cpu_until_memory_is_made(durations, expected, monkeypatch):
    assert steady(durations, CPU, monkeypatch) == expected


def test_on_a_gpu_as_few_as_can_be(monkeypatch):
    assert steady([2.0, 1.0, 0.5, 0.1, 0.2, 9], GPU, monkeypatch, warming=3) == (0.15, 5)
    assert steady([30.0, 1.0, 0.5, 0.1, 0.2, 9], GPU, monkeypatch, warming=3) == (0.15, 5)
    assert steady([30.0, 9.5, 1], GPU, monkeypatch, warming=3) == (9.5, 2)
