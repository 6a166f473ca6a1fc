"""From a search to a confirmed winner and its test score, with the installed command and real workers."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest
from commands import COMMAND, answer, call, environment, here, killed, wait_for
from helpers import write_folders

VALUES = "epochs=12,batch_size=32,augmentation=center_crop"
STUDY = ("--study", "demo", "--data", "images")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with a study of two short trials on small images."""
    folder = tmp_path_factory.mktemp("winners")
    write_folders(folder / "images", images=12)
    queued = [f"learning_rate={rate},{VALUES}" for rate in (0.01, 0.02)]
    enqueue = [part for text in queued for part in ("--enqueue", text)]
    document = answer("search", *STUDY, "--trials", 2, "--no-baselines", *enqueue, cwd=folder, run=here)
    assert document["complete"] == 2
    return folder


@pytest.mark.parametrize("command", [("confirm", "--finalists", 2, "--seeds", 2), ("final",)])
def test_they_keep_to_the_memory_that_they_are_given(searched, command):
    done = here(*command, *STUDY, "--memory", 0.05, cwd=searched)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "51 MiB may be used" in done.stderr and "more --memory" in done.stderr


def test_confirm_goes_on_after_ctrl_c_and_ranks_the_finalists(searched):
    command = ["confirm", *STUDY, "--finalists", "2", "--seeds", "2"]
    with subprocess.Popen(
        [COMMAND, *command], cwd=searched, env=environment(), stderr=subprocess.PIPE, text=True
    ) as running:
        first = wait_for(running, "finished, best validation")
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        assert running.wait(timeout=30) == 130
    assert "seed 1" in first and "goes on from here" in rest and "Traceback" not in rest
    done = call(*command, "--json", cwd=searched)
    assert done.returncode == 0 and first.split(" finished")[0] not in done.stderr, done.stderr
    made = json.loads(done.stdout)
    assert made["seeds"] == [1, 2] and {one["trial"] for one in made["finalists"]} == {0, 1}
    means = [one["mean"] for one in made["finalists"]]
    assert means == sorted(means, reverse=True) and made["winner"] == made["finalists"][0]["trial"]
    best = next(one for one in made["finalists"] if one["trial"] == made["search_best"])
    assert made["optimism"] == pytest.approx(best["search_value"] - best["mean"])
    again = here("confirm", "--study", "demo", "--finalists", 2, "--seeds", 2, cwd=searched)
    assert again.returncode == 0 and "all 4 trainings done before" in again.stderr
    for words in ("winner: trial", "over seeds 1, 2", "optimism: the search's best"):
        assert words in again.stdout


def test_final_takes_the_confirmed_winner_over_seeds(searched):
    """Its supervisor is killed; it goes on and has the search's accuracy: the same recipe trains alike."""
    winner = answer("confirm", *STUDY, "--finalists", 2, "--seeds", 2, cwd=searched, run=here)["winner"]
    killed("final", *STUDY, "--seeds", 2, "--workers", 2, cwd=searched)
    done = call("final", *STUDY, "--seeds", 2, "--workers", 2, "--json", cwd=searched)
    made = json.loads(done.stdout)
    assert f"trial {winner}, confirmed over 2 seeds" in done.stderr
    assert f"trial {winner} seed 0 goes on from its checkpoint" in done.stderr
    assert f"trial {winner} seed 1 goes on from its checkpoint" in done.stderr
    assert not list((searched / "storage").rglob("*.checkpoint*"))
    rows = answer("report", "--study", "demo", cwd=searched, run=here)["rows"]
    (row,) = [row for row in rows if row["trial"] == winner]
    assert made["results"][0]["val_accuracy"] == row["val_accuracy"]
    assert (made["trial"], made["seeds"]) == (winner, 2)
    assert [result["seed"] for result in made["results"]] == [0, 1]
    scores = [result["test_accuracy"] for result in made["results"]]
    assert made["test_accuracy"] == pytest.approx(sum(scores) / 2)
    single = here("final", "--study", "demo", "--json", cwd=searched)
    assert json.loads(single.stdout) == made["results"][0] and "not used again" in single.stderr
    shown = here("final", "--study", "demo", "--seeds", 2, cwd=searched).stdout
    for words in ("over 2 seeds", "seed 0: test top-1", "seed 1: test top-1", "used 2 times"):
        assert words in shown
    refused = here("final", *STUDY, "--trial", 1 - winner, cwd=searched)
    assert refused.returncode == 2 and '--again "reason"' in refused.stderr and refused.stdout == ""
    shown = " ".join(here("report", "--study", "demo", cwd=searched).stdout.split())
    assert "the test set was used 2 times on this study" in shown
    assert f"confirmed: trial {winner}: mean validation" in shown and "over 2 fresh seeds" in shown
