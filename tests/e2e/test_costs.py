"""What a search costs, as the commands say it: plan, bench, --memory."""

from __future__ import annotations

import json

import pytest
from commands import call, here
from helpers import write_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("costs")
    write_folders(folder / "images", images=24)
    return folder


def test_a_plan(folder):
    done = call("plan", "--study", "demo", "--data", "images", "--trials", 3, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not (folder / "storage" / "studies.db").exists()  # nothing was begun
    assert 0 < found["start_seconds"] < found["seconds_low"] < found["seconds"] < found["seconds_high"]
    assert found["remaining"] == 3 and found["history_trials"] == 0
    assert {kind["batch_size"] for kind in found["kinds"]} == {32, 64, 128}
    assert all(kind["epoch_seconds"] > 0 for kind in found["kinds"])
    assert found["memory"] > 1 << 26 and found["disk"]["pixels"] > 0 and found["disk"]["weights"] > 40e6
    # the model, its momentum and the best epoch's weights, three times
    assert found["disk"]["checkpoints"] == pytest.approx(9 * found["disk"]["weights"], rel=0.05)


def test_too_little_memory_for_any_training_is_refused_before_the_first_trial(folder):
    done = here(
        "search", "--study", "demo@small", "--data", "images", "--trials", 2, "--memory", 0.05, cwd=folder
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "could be timed: 2 images at a time need about" in done.stderr and "--memory" in done.stderr
    assert "51 MiB may be used" in done.stderr and "trial 0" not in done.stderr


def test_a_plan_keeps_to_the_memory_that_the_search_would_have(folder):
    """Each of two workers has half of it."""
    planned = ("plan", "--study", "demo", "--data", "images", "--workers", 2)
    done = here(*planned, "--memory", 0.1, cwd=folder)
    assert done.returncode == 2 and "51 MiB may be used" in done.stderr and "more --memory" in done.stderr
    done = here(*planned, "--memory", 0.1, "--trials", 1, cwd=folder)  # which one worker runs
    assert done.returncode == 2 and "102 MiB may be used" in done.stderr


def test_bench_of_searching(folder):
    done = here("bench", "--search", "--trials", 3, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["trials"] == 3 and document["ours_ms"] > 0 and document["optuna_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--model", "nonsense"], "there is no architecture 'nonsense'"),
        (["bench", "--study", "demo", "--model", "alexnet"], "--study and --model together"),
        (["bench", "--study", "demo", "--workers", "1"], "--workers and --study together"),
        (["bench", "--workers", "1,x"], "--workers 1,x: not whole numbers above 0"),
        (["plan", "--study", "nonsense"], "nonsense"),
        (["search", "--study", "demo", "--memory", "0"], "memory"),
    ],
)
def test_wrong_input_is_refused(arguments, words, folder):
    done = here(*arguments, cwd=folder)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
