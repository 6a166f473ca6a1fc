"""`replay` and `report --all` as a user types them, on a search that is in the database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_studies import searched

COMMAND = str(Path(sys.executable).with_name("caltech-hpo"))


def call(*arguments, cwd):
    return subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=cwd, env=os.environ | {"NO_COLOR": "1", "COLUMNS": "120"},
        capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a demo search in ./storage: the second trial lags."""
    folder = tmp_path_factory.mktemp("demo")
    searched(
        folder / "storage", lambda trial, epoch: 0.5 / (1 + trial) + 0.01 * epoch, trials=4, pruning=False
    )
    return folder


def test_replay_answers(folder):
    done = call("replay", "--study", "demo", "--pruner", "median:startup_trials=1", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (row,) = document["pruners"]
    assert (document["winner"], document["cut_short"], row["regret"]) == (0, 0, 0.0)
    assert row["trials_pruned"] == 3 and row["winner_pruned_at"] is None
    shown = call("replay", "--study", "demo", cwd=folder).stdout
    for words in ("median", "percentile", "hyperband", "fraction", "epochs saved", "kept", "4 trials"):
        assert words in shown
    refused = call("replay", "--study", "demo", "--pruner", "fastest", cwd=folder)
    assert refused.returncode == 2 and "--pruner fastest" in refused.stderr


def test_report_all_writes_both_pages(folder):
    done = call("report", "--all", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {row["study"] for row in document["summary"]} > {"demo", "alexnet-scratch", "vgg16-transfer"}
    assert Path(document["html"]) == Path("storage/reports/report.html")
    assert (folder / document["html"]).stat().st_size > 1_000_000
    assert (folder / document["markdown"]).read_text().startswith("# All studies")
    shown = call("report", "--all", "--output", "out", cwd=folder).stdout
    assert "alexnet-scratch" in shown and "not run" in shown and (folder / "out" / "report.md").is_file()
    assert call("report", "--all", "--study", "demo", cwd=folder).returncode == 2
    assert call("report", cwd=folder).returncode == 2
