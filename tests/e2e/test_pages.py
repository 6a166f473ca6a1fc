"""`replay` and `report --all` as a user types them, on a search that is in the database."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import call, here
from made_studies import searched


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a demo search in ./storage: the second trial lags."""
    folder = tmp_path_factory.mktemp("demo")
    searched(
        folder / "storage", lambda trial, epoch: 0.5 / (1 + trial) + 0.01 * epoch, trials=4, pruning=False
    )
    return folder


def test_replay_answers(folder):
    done = here("replay", "--study", "demo", "--pruner", "median:startup_trials=1", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (row,) = document["pruners"]
    assert (document["winner"], document["cut_short"], row["regret"]) == (0, 0, 0.0)
    assert row["trials_pruned"] == 3 and row["winner_pruned_at"] is None
    shown = here("replay", "--study", "demo", cwd=folder).stdout
    for words in ("median", "percentile", "hyperband", "fraction", "epochs saved", "kept", "4 trials"):
        assert words in shown
    refused = here("replay", "--study", "demo", "--pruner", "fastest", cwd=folder)
    assert refused.returncode == 2 and "--pruner fastest" in refused.stderr


def test_report_all_writes_both_pages(folder):
    done = call("report", "--all", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {row["study"] for row in document["summary"]} > {"demo", "alexnet-scratch", "vgg16-transfer"}
    assert Path(document["html"]) == Path("storage/reports/report.html")
    assert (folder / document["html"]).stat().st_size > 1_000_000
    assert (folder / document["markdown"]).read_text().startswith("# All studies")
    shown = here("report", "--all", "--output", "out", cwd=folder).stdout
    assert "alexnet-scratch" in shown and "not run" in shown and (folder / "out" / "report.md").is_file()
    assert here("report", "--all", "--study", "demo", cwd=folder).returncode == 2
    assert here("report", cwd=folder).returncode == 2
