"""Searches that are killed, whole or in part, and go on: the same trials, the same curves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import write_folders

COMMAND = str(Path(sys.executable).with_name("caltech-hpo"))
VALUES = "batch_size=32,augmentation=random_crop,epochs=9"
SEARCH = (
    "search", "--study", "demo", "--data", "images", "--no-baselines", "--no-pruning",
    "--enqueue", f"learning_rate=0.01,{VALUES}", "--enqueue", f"learning_rate=0.02,{VALUES}", "--trials", "2",
)  # fmt: skip


def environment():
    return {k: v for k, v in os.environ.items() if not k.startswith("CALTECH_HPO_")} | {"NO_COLOR": "1"}


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


def wait_for(search, words):
    for line in search.stderr:
        if words in line:
            return
    raise AssertionError(f"{words} never came")


# The other ways, and many more instants, are in tests/faults.
@pytest.mark.parametrize(("who", "workers"), [("worker", "2"), ("everything", "2")], ids=lambda value: value)
def test_after_kill_9_the_same_trials_go_on(folder, whole, who, workers):
    with begin(folder, "--workers", workers) as search:
        wait_for(search, "trial 0 epoch 3/")
        processes = [psutil.Process(search.pid), *psutil.Process(search.pid).children(recursive=True)]
        trainers = [p for p in processes[1:] if "spawn_main" in " ".join(p.cmdline())]
        assert len(trainers) == int(workers)
        victims = {"worker": trainers[:1], "supervisor": processes[:1], "everything": processes}[who]
        for process in victims:
            process.kill()
        rest = search.stderr.read()
        assert search.wait(timeout=120) == (0 if who == "worker" else -signal.SIGKILL)
    assert ("trial 0 goes on" in rest or "trial 1 goes on" in rest) == (who == "worker")
    for process in trainers:
        process.wait(timeout=30)  # workers end by themselves when their supervisor is gone
    again = finish(folder, "--workers", workers)
    assert who == "worker" or "trial 0 goes on" in again
    assert curves(folder) == whole[1]
    assert not list((folder / "storage" / "checkpoints" / "demo").iterdir())
    assert best_weights(folder) == best_weights(whole[0])


def test_a_signal_pauses_and_the_command_goes_on(folder, whole):
    number, code = signal.SIGTERM, 143
    with begin(folder) as search:
        wait_for(search, "trial 0 epoch 2/")
        sent = time.monotonic()
        search.send_signal(number)
        rest = search.stderr.read()
        assert search.wait(timeout=20) == code and time.monotonic() - sent < 20
    assert "pausing" in rest and "trial 0 is paused" in rest and "goes on from here" in rest
    assert "Traceback" not in rest
    assert [file.name for file in (folder / "storage" / "checkpoints" / "demo").iterdir()] == [
        "trial-0.checkpoint"
    ]
    assert "trial 0 goes on" in finish(folder)
    assert curves(folder) == whole[1]


def test_a_second_signal_ends_at_once(folder, whole):
    with begin(folder) as search:
        wait_for(search, "trial 0 epoch 2/")
        search.send_signal(signal.SIGINT)
        wait_for(search, "pausing")
        search.send_signal(signal.SIGINT)
        rest = search.stderr.read()
        assert search.wait(timeout=20) in (130, -signal.SIGINT)
    assert "Traceback" not in rest
    state, _, epochs = curves(folder)[0]
    assert state == "running" and len(epochs) >= 2
    finish(folder)
    assert curves(folder) == whole[1]


def told(folder, *command):
    """The JSON answer, without what differs from call to call."""
    done = subprocess.run(
        [COMMAND, *command, "--study", "demo", "--data", "images", "--json"], cwd=folder, env=environment(),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dropped = ("seconds", "time", "scored_at", "finished_at", "model", "folder")
    return strip(json.loads(done.stdout), dropped), done.stderr


def strip(value, dropped):
    if isinstance(value, dict):
        return {key: strip(part, dropped) for key, part in value.items() if key not in dropped}
    return [strip(part, dropped) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "command",
    [pytest.param(("confirm", "--finalists", "1", "--seeds", "2"), marks=pytest.mark.storm), ("final",)],
    ids=["confirm", "final"],
)
def test_confirm_and_final_go_on_after_their_supervisor_was_killed(tmp_path, whole, command):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        shutil.copytree(whole[0], folder, symlinks=True)
    expected, _ = told(theirs, *command)
    with subprocess.Popen(
        [COMMAND, *command, "--study", "demo", "--data", "images"], cwd=ours, env=environment(),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    ) as running:  # fmt: skip
        wait_for(running, "epoch 5/")
        children = psutil.Process(running.pid).children(recursive=True)
        running.kill()
        running.stderr.read()
    for child in children:
        child.wait(timeout=30)
    assert list((ours / "storage").rglob("*.checkpoint"))  # where the worker stood when it was left alone
    found, _ = told(ours, *command)
    assert found == expected
    assert not list((ours / "storage").rglob("*.checkpoint*"))
