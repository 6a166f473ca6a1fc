"""Checkpoints whose writing is killed, and checkpoints whose bits are flipped."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest
import torch

from caltech_hpo.training.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from caltech_hpo.training.checkpoint_files import previous, remove_checkpoint

FLIPS = 300


def tensors(number):
    return {"weights": torch.full((50_000,), float(number)), "step": torch.tensor([number])}


def save_for_ever(path, first, acknowledge):
    """Saves number after number; says each one when it is saved."""
    for number in range(first, first + 10**9):
        save_checkpoint(path, tensors(number), {"number": number})
        os.write(acknowledge, number.to_bytes(8, "little"))


@pytest.mark.parametrize("kills", [40, pytest.param(300, marks=pytest.mark.storm)])
def test_killed_while_saving_the_last_or_the_one_before_is_whole(tmp_path, kills):
    draw, path = random.Random(0), tmp_path / "trial-0.checkpoint"
    first, said, unreadable, lost = 1, 0, 0, 0
    for _ in range(kills):
        ours, theirs = os.pipe()
        # Forked, unlike our workers: torch takes seconds to import, and this process has no threads running.
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                save_for_ever(path, first, theirs)
            os._exit(1)
        os.close(theirs)
        acknowledged = int.from_bytes(os.read(ours, 8), "little")
        time.sleep(draw.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while len(more := os.read(ours, 8)) == 8:
            acknowledged = int.from_bytes(more, "little")
        os.close(ours)
        found = load_checkpoint(path)
        if found is None:
            unreadable += 1
            continue
        number = found[1]["number"]
        assert torch.equal(found[0]["weights"], tensors(number)["weights"])
        # Between the two renames the one before is the last that was acknowledged.
        lost += number < acknowledged
        said += acknowledged - first + 1
        first = number + 1
    assert (unreadable, lost) == (0, 0) and said >= kills
    remove_checkpoint(path)
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_is_detected(tmp_path):
    draw, path = random.Random(0), tmp_path / "trial-0.checkpoint"
    save_checkpoint(path, tensors(1), {"number": 1})
    save_checkpoint(path, tensors(2), {"number": 2})
    whole = path.read_bytes()
    for position in (*range(56), *(draw.randrange(len(whole)) for _ in range(FLIPS - 56))):
        content = bytearray(whole)
        content[position] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert read_checkpoint(path) is None
        found = load_checkpoint(path)
        assert found is not None and found[1]["number"] == 1
    for length in (0, 1, 7, 8, 47, 48, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert read_checkpoint(path) is None
    path.write_bytes(whole)
    assert load_checkpoint(path)[1]["number"] == 2
    previous(path).unlink()
    path.write_bytes(b"")
    assert load_checkpoint(path) is None
