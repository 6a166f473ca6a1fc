"""Searches that are killed, whole or in part, and go on: the same trials, the same curves."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from commands import COMMAND, environment, killed, wait_for
from helpers import write_folders

DATA = ("--study", "demo", "--data", "images")
VALUES = "batch_size=32,augmentation=random_crop,epochs=10"
SEARCH = (
    "search", *DATA, "--no-baselines", "--no-pruning",
    "--enqueue", f"learning_rate=0.01,{VALUES}", "--enqueue", f"learning_rate=0.02,{VALUES}", "--trials", "2",
)  # fmt: skip


def begin(folder, *more):
    return subprocess.Popen(
        [COMMAND, *SEARCH, *more], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def finish(folder, *more):
    done = subprocess.run(
        [COMMAND, *SEARCH, *more], cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def curves(folder):
    """Each trial's state and epochs, without their seconds."""
    from caltech_hpo.search.records import trial_records
    from caltech_hpo.search.storage import stored_study

    study = stored_study(f"sqlite:///{folder}/storage/studies.db", "demo")
    return [
        (record.state, record.params, [epoch.model_dump(exclude={"seconds"}) for epoch in record.epochs])
        for record in trial_records(study)
    ]


def best_weights(folder):
    """Name and content of what the best trial has left; there is nothing else."""
    (file,) = (folder / "storage" / "models").iterdir()
    return file.name, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_folders(folder / "images", images=12)
    finish(folder)
    return folder, curves(folder)


@pytest.fixture
def folder(tmp_path, whole):
    (tmp_path / "images").symlink_to(whole[0] / "images")
    return tmp_path


# More ways, at random instants, are in tests/faults.
def test_killed_stopped_and_killed_again_the_same_trials_go_on(folder, whole):
    """Everything is killed, then SIGTERM comes, then Ctrl-C twice."""
    with begin(folder) as search:
        wait_for(search, "trial 0 epoch 2/")
        everything = [psutil.Process(search.pid), *psutil.Process(search.pid).children(recursive=True)]
        for process in everything:
            process.kill()
        assert search.wait(timeout=120) == -signal.SIGKILL
    for process in everything[1:]:
        process.wait(timeout=30)
    assert curves(folder)[0][0] == "running"

    with begin(folder) as search:
        wait_for(search, "trial 0 goes on")
        wait_for(search, "trial 0 epoch ")
        sent = time.monotonic()
        search.send_signal(signal.SIGTERM)
        rest = search.stderr.read()
        assert search.wait(timeout=20) == 143 and time.monotonic() - sent < 20
    assert "pausing" in rest and "trial 0 is paused" in rest and "goes on from here" in rest
    assert "Traceback" not in rest
    kept = {file.name for file in (folder / "storage" / "checkpoints" / "demo").iterdir()}
    assert "trial-0.checkpoint" in kept

    with begin(folder) as search:
        wait_for(search, "trial 0 epoch ")
        search.send_signal(signal.SIGINT)
        wait_for(search, "pausing")
        search.send_signal(signal.SIGINT)
        rest = search.stderr.read()
        assert search.wait(timeout=20) in (130, -signal.SIGINT)
    assert "Traceback" not in rest
    assert curves(folder)[0][0] == "running"

    assert "trial 0 goes on" in finish(folder)
    assert curves(folder) == whole[1]
    assert not list((folder / "storage" / "checkpoints" / "demo").iterdir())
    assert best_weights(folder) == best_weights(whole[0])


def told(folder, *command):
    """The JSON answer, without what differs from call to call."""
    done = subprocess.run(
        [COMMAND, *command, *DATA, "--json"], cwd=folder, env=environment(),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dropped = ("seconds", "time", "scored_at", "finished_at", "model", "folder")
    return strip(json.loads(done.stdout), dropped), done.stderr


def strip(value, dropped):
    if isinstance(value, dict):
        return {key: strip(part, dropped) for key, part in value.items() if key not in dropped}
    return [strip(part, dropped) for part in value] if isinstance(value, list) else value


@pytest.mark.storm
def test_confirm_goes_on_after_its_supervisor_was_killed(tmp_path, whole):
    ours, theirs = (shutil.copytree(whole[0], tmp_path / name, symlinks=True) for name in ("ours", "theirs"))
    command = ("confirm", "--finalists", "1", "--seeds", "2")
    expected, _ = told(theirs, *command)
    killed(*command, *DATA, cwd=ours)
    found, _ = told(ours, *command)
    assert found == expected
    assert not list((ours / "storage").rglob("*.checkpoint*"))
