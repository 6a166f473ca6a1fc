"""A disk that is full at many points of a search: what was shown is there, and the search goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest
from made_studies import Curves

from caltech_hpo.search import running, supervisor
from caltech_hpo.search.events import NoRoom, TrialEnded, TrialEpoch
from caltech_hpo.search.maintenance import examine
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.space import Binding
from caltech_hpo.search.storage import open_storage, open_study, stored_study
from caltech_hpo.search.supervisor import Supervisor
from caltech_hpo.search.urls import default_url
from caltech_hpo.search.write_through import hold
from caltech_hpo.study_files import load_study

POINTS, TRIALS = 40, 6


@contextlib.contextmanager
def small_disk(folder):
    """A file system of its own with 2 MiB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        # lazily: Optuna's pool may still hold the database open
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(path, left):
    """Takes all room but `left` bytes."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    os.truncate(path, max(0, path.stat().st_size - left))


def supervise(home, number):
    spec, name = load_study("demo"), f"demo@{number}"
    storage = open_storage(default_url(home))
    study = open_study(storage, name, spec, "x", sampler_seed=0, allow_changed=False)
    binding = Binding(classes=10, data="x", seed=0, precision="fp32")
    curves = Curves(lambda trial, epoch: 0.05 * trial + 0.01 * epoch)
    return Supervisor(*hold(study, storage), spec, curves, binding, pruning=False).run(TRIALS)


def searched(home, filler, point):
    """What was shown of a search whose disk fills up after some events; and how often it had to wait."""
    said, waited = {}, 0
    for count, event in enumerate(supervise(home, point)):
        if count == point % 20 + 1:
            fill(filler, left=point * 512)
        if isinstance(event, NoRoom):
            waited += 1
            filler.unlink()
        elif isinstance(event, TrialEpoch):
            said[event.number, event.result.epoch] = event.result.validation_top1
        elif isinstance(event, TrialEnded):
            said[event.number, "state"] = event.state
    return said, waited


def test_no_room_at_forty_points(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "ROOM_EVERY", 0.0)
    monkeypatch.setattr(supervisor, "LATEST", -1.0)  # each event is written by itself
    acknowledged = full = lost = 0
    for point in range(POINTS):
        with small_disk(tmp_path / f"disk-{point}") as disk:
            said, waited = searched(disk, disk / "filler", point)
            url = default_url(disk)
            assert not examine(url).problems
            records = trial_records(stored_study(url, f"demo@{point}"))
        stored = {(r.number, e.epoch): e.validation_top1 for r in records for e in r.epochs}
        stored |= {(record.number, "state"): record.state for record in records}
        assert stored.keys() == said.keys() and len(records) == TRIALS
        lost += sum(stored[key] != value for key, value in said.items())
        acknowledged, full = acknowledged + len(said), full + (waited > 0)
    assert lost == 0 and full == POINTS and acknowledged > 1000
