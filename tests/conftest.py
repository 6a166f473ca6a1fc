"""Fixtures: image folders that the tests write, the real images where they are, a clean environment."""

from __future__ import annotations

import os
from pathlib import Path

# Tensors here are tiny: threads would only wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
from helpers import write_folders

# A busy machine is no failure: nothing here is timed.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

CALTECH101 = Path(__file__).parents[2] / "shared" / "data" / "caltech101"


def pytest_xdist_auto_num_workers(config):
    """One more than cores: many tests wait for other processes."""
    return (os.cpu_count() or 1) + 1


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=60, help="kills of the storm (pytest -m storm)")


# Files that take a minute and more come first: one that comes last keeps one core waiting.
LONG = (
    "e2e", "faults", "test_ray", "test_queue", "test_executors", "test_transfer_rows", "test_library",
    "test_models_in_use", "test_bench", "test_maintenance",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    import torch

    items.sort(key=lambda item: not any(name in item.path.as_posix() for name in LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """A user's own settings must not reach the tests."""
    for name in ("HOME", "STORAGE", "DATA", "TOKEN"):
        monkeypatch.delenv(f"CALTECH_HPO_{name}", raising=False)


@pytest.fixture(scope="session")
def caltech101() -> Path:
    """The real images."""
    if not CALTECH101.is_dir():
        pytest.skip(f"needs the real images at {CALTECH101}")
    return CALTECH101


@pytest.fixture
def folders(tmp_path) -> Path:
    """Three classes of nine images."""
    return write_folders(tmp_path / "images")
