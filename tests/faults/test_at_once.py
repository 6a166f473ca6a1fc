"""Several searches at once on one study, and `final` killed at random instants."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import write_folders

from caltech_hpo.search.records import trial_records
from caltech_hpo.search.storage import stored_study
from caltech_hpo.search.urls import default_url

COMMAND = str(Path(sys.executable).with_name("caltech-hpo"))


def start(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CALTECH_HPO_")}
    return subprocess.Popen(
        [COMMAND, *arguments, "--study", "demo", "--data", "images"], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def test_of_four_searches_at_once_one_runs(tmp_path):
    write_folders(tmp_path / "images", images=12)
    searches = [start(tmp_path, "search", "--trials", "2") for _ in range(4)]
    said = [search.communicate(timeout=240)[0] for search in searches]
    codes = [search.returncode for search in searches]
    assert sorted(codes) == [0, 4, 4, 4], said
    runner = searches[codes.index(0)].pid
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or f"another search on study 'demo' is running: process {runner} on" in text
    records = trial_records(stored_study(default_url(tmp_path / "storage"), "demo"))
    assert len(records) == 2 and all(record.state in ("complete", "pruned") for record in records)


@pytest.mark.storm
@pytest.mark.timeout(0)
def test_final_is_killed_and_the_test_set_is_scored_once(tmp_path, request, record_property):
    """A fifth of the storm's kills, at least 6; each round trains one seed more."""
    draw, kills = random.Random(0), max(6, request.config.getoption("--kills") // 5)
    write_folders(tmp_path / "images", images=12)
    assert start(tmp_path, "search", "--trials", "2").wait(timeout=240) == 0
    killed, rounds = 0, 0
    while killed < kills:
        rounds += 1
        for _ in range(min(5, kills - killed)):
            final = start(tmp_path, "final", "--seeds", str(rounds), "--json")
            time.sleep(draw.uniform(1, 9))
            if final.poll() is not None:
                break
            family = [psutil.Process(final.pid), *psutil.Process(final.pid).children(recursive=True)]
            for process in family if draw.random() < 0.3 else [draw.choice(family)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            killed += 1
            final.communicate()
        final = start(tmp_path, "final", "--seeds", str(rounds), "--json")
        text, _ = final.communicate(timeout=240)
        assert final.returncode == 0, text
        with sqlite3.connect(tmp_path / "storage" / "studies.db") as connection:
            rows = connection.execute("SELECT seed, count(*) FROM final_scores GROUP BY seed").fetchall()
        connection.close()
        assert len(rows) == rounds and all(count == 1 for _, count in rows)
    facts = {"kills": killed, "seeds": rounds, "scores": len(rows)}
    print("\nfinal:", json.dumps(facts))
    record_property("final", json.dumps(facts))
