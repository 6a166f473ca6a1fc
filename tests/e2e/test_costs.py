"""What a search costs, as the commands say it: plan, bench, --memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_folders

COMMAND = str(Path(sys.executable).with_name("caltech-hpo"))
ROW = {"model", "phase", "stock", "ours", "floor", "over_stock", "of_floor", "data_wait_s"}


def call(*arguments, cwd, timeout=240):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CALTECH_HPO_")}
    return subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=cwd, env=kept | {"NO_COLOR": "1", "COLUMNS": "120"},
        timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("costs")


@pytest.fixture(scope="module")
def planned(folder):
    done = call("plan", "--study", "demo", "--trials", 3, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "storage" / "studies.db").exists()  # nothing was begun
    return json.loads(done.stdout)


def test_a_plan_before_and_after_a_search(folder, planned):
    before = planned
    assert 0 < before["seconds_low"] < before["seconds"] < before["seconds_high"]
    assert before["remaining"] == 3 and before["history_trials"] == 0
    assert {kind["batch_size"] for kind in before["kinds"]} == {32, 64, 128}
    assert all(kind["epoch_seconds"] > 0 for kind in before["kinds"])
    assert before["memory"] > 1 << 26 and before["disk"]["pixels"] > 0 and before["disk"]["weights"] > 40e6

    done = call("search", "--study", "demo", "--trials", 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "2 trials in about" in done.stderr and "80% likely" in done.stderr
    assert done.stderr.index("trials in about") < done.stderr.index("trial 0 starts")

    done = call("plan", "--study", "demo", "--trials", 3, cwd=folder)
    assert "1 trials in about" in done.stdout and "counted over 1 trials" in done.stdout
    assert "disk: decoded images" in done.stdout and "memory:" in done.stdout


def test_too_little_memory_ends_trials_with_its_reason_and_the_way_out(folder):
    done = call("search", "--study", "demo@small", "--trials", 2, "--memory", 0.05, cwd=folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "out of memory: 2 images at a time need about" in done.stderr and "--memory" in done.stderr


def test_a_batch_is_cut_where_memory_is_short(folder, planned):
    needed = {kind["batch_size"]: kind["memory"] - planned["disk"]["weights"] for kind in planned["kinds"]}
    room = (needed[32] + needed[64]) / 2 / 2**30  # the hand-tuned row has 64
    done = call("search", "--study", "demo@cut", "--trials", 1, "--memory", room, cwd=folder)
    assert done.returncode == 0, done.stderr
    import optuna

    study = optuna.load_study(study_name="demo@cut", storage=f"sqlite:///{folder}/storage/studies.db")
    assert (study.trials[0].params["batch_size"], study.trials[0].user_attrs["micro_batch"]) == (64, 32)


def test_bench_gives_its_rows(folder):
    data = write_folders(folder / "images", images=12)
    done = call(
        "bench", "--study", "demo", "--seconds", 0.1, "--rounds", 1, "--batch-size", 4, "--device", "cpu",
        "--data", data, "--json", cwd=folder, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *rows, cache = json.loads(done.stdout)
    assert [row["phase"] for row in rows] == ["train", "eval", "epoch"]
    assert all(row.keys() >= ROW and row["ours"] > 0 and row["stock"] > 0 for row in rows)
    assert cache["phase"] == "cache" and cache["per_core"] > 0


def test_bench_of_searching(folder):
    done = call("bench", "--search", "--trials", 3, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["trials"] == 3 and document["ours_ms"] > 0 and document["optuna_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--model", "nonsense"], "there is no architecture 'nonsense'"),
        (["bench", "--study", "demo", "--model", "alexnet"], "--study and --model together"),
        (["bench", "--workers", "1,x"], "--workers 1,x: not whole numbers above 0"),
        (["plan", "--study", "nonsense"], "nonsense"),
        (["search", "--study", "demo", "--memory", "0"], "memory"),
    ],
)
def test_wrong_input_is_refused(arguments, words, folder):
    done = call(*arguments, cwd=folder)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
