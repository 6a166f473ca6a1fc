"""Searches whose processes are killed at random instants, and continued, until they are done.

Run on request: pytest -m storm --kills 60. What the user was shown (the lines of the log) is the record of
acknowledgements: every one of them must be in the database afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from commands import COMMAND, environment
from helpers import write_folders

from caltech_hpo.search.maintenance import examine
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.storage import stored_study
from caltech_hpo.search.urls import default_url

HOMES, WORKERS = 2, 2
# Most of a search that is killed again and again is its start, and a random instant mostly falls there. These
# kills wait for something new to be shown, so that enough is: at most so many acknowledgements.
WAITING, MOST_SHOWN, MOST_SHOWN_LONG = 0.3, 20, 60
LONG = 500  # kills
LONGEST = 240.0  # seconds that a search may take without showing anything
EPOCH = re.compile(r"trial (\d+) epoch (\d+)/\d+: .*?validation (\d\.\d+)")
ENDED = re.compile(r"trial (\d+) (complete|pruned|failed)(?::[^,]*)?.*, best validation")

pytestmark = [pytest.mark.storm, pytest.mark.timeout(0)]


@dataclass
class Storm:
    """One home, its searches one after the other, and what they have shown."""

    folder: Path
    draw: random.Random
    trials: int
    most_shown: int
    kills: Counter[str] = field(default_factory=Counter)
    studies: int = 0
    stuck: int = 0
    codes: Counter[int] = field(default_factory=Counter)

    @property
    def study(self) -> str:
        return f"demo@{self.studies + 1}"

    @property
    def log(self) -> Path:
        """Written by the search itself, outside the database; every search adds to it."""
        return self.folder / f"{self.study}.log"

    @contextlib.contextmanager
    def searching(self):
        command = [COMMAND, "search", "--study", self.study, "--trials", str(self.trials), "--data", "images"]
        with self.log.open("ab") as log, subprocess.Popen(
            [*command, "--workers", str(WORKERS), "--no-pruning"], cwd=self.folder, stdout=log, stderr=log,
            env=environment(), stdin=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            yield process

    def shown(self, start: int) -> int:
        """Acknowledgements in the log from byte `start` on."""
        with self.log.open("rb") as log:
            log.seek(start)
            text = log.read()
        return text.count(b" epoch ") + text.count(b"best validation")

    def strike(self, process) -> None:
        """Kills one of the search's processes, at a random instant of its start or of its work."""
        before, begun = self.log.stat().st_size, time.monotonic()
        wanted = self.draw.randint(1, self.most_shown) if self.draw.random() < WAITING else 0
        while self.shown(before) < wanted and process.poll() is None and time.monotonic() < begun + 120:
            time.sleep(0.02)
        time.sleep(self.draw.uniform(0, 0.5 if wanted else 6))
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            if parent.status() == psutil.STATUS_ZOMBIE:
                return
            children = parent.children(recursive=True)
            victims = (
                [parent, *children] if self.draw.random() < 0.1 else [self.draw.choice([parent, *children])]
            )
            for victim in victims:
                victim.kill()
            self.kills[
                "everything" if len(victims) > 1 else "supervisor" if victims == [parent] else "worker"
            ] += 1

    def settle(self, process) -> bool:
        """Waits for the search's end; True if it was killed or failed, False if the study is done."""
        size, since = -1, time.monotonic()
        while process.poll() is None:
            time.sleep(0.05)
            if (now := self.log.stat().st_size) != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > LONGEST:
                self.stuck += 1
                process.kill()
        self.codes[process.returncode] += 1
        return process.returncode != 0

    def run(self, kills: int) -> None:
        """Study after study until there were so many kills, then without any until the last one is done."""
        done = False
        while not done or sum(self.kills.values()) < kills:
            with self.searching() as process:
                while process.poll() is None and sum(self.kills.values()) < kills:
                    self.strike(process)
                done = not self.settle(process)
            self.studies += done
            print(
                f"{self.folder.name}: {sum(self.kills.values())} kills, study {self.studies + 1}", flush=True
            )
            assert self.codes[process.returncode] < 3 * kills + 3, self.log.read_text()[-2000:]


def acknowledged(
    log: Path,
) -> tuple[Counter[tuple[int, int]], dict[tuple[int, int], str], Counter[int], dict[int, str]]:
    """How often each epoch was shown and its accuracy; how often each trial's end was and its state."""
    epochs, values, ends, states = Counter(), {}, Counter(), {}
    for line in log.read_text().splitlines():
        if found := EPOCH.match(line):
            key = int(found[1]), int(found[2])
            epochs[key] += 1
            values[key] = found[3]
        elif found := ENDED.match(line):
            ends[int(found[1])] += 1
            states[int(found[1])] = found[2]
    return epochs, values, ends, states


def test_storm(tmp_path, request, record_property):
    """Two homes at once: while one search starts, the other trains."""
    kills = request.config.getoption("--kills")
    seed = int(os.environ.get("STORM_SEED", time.time_ns() % 2**32))
    write_folders(tmp_path / "images", images=12)
    storms = []
    for number in range(HOMES):
        folder = tmp_path / f"home-{number}"
        folder.mkdir()
        (folder / "images").symlink_to(tmp_path / "images")
        size = (30, MOST_SHOWN_LONG) if kills >= LONG else (15, MOST_SHOWN)
        storms.append(Storm(folder, random.Random(seed + number), *size))
    begun = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(Storm.run, storms, [-(-kills // HOMES)] * HOMES))
    found = [counted(storm) for storm in storms]
    facts = {
        "kills": dict(sum((storm.kills for storm in storms), Counter())),
        "exit codes": dict(sum((storm.codes for storm in storms), Counter())),
        **{name: sum(figures[name] for figures in found) for name in found[0]},
        "seed": seed, "minutes": round((time.monotonic() - begun) / 60, 1),
    }  # fmt: skip
    print("\nstorm:", json.dumps(facts))
    record_property("storm", json.dumps(facts))
    enough = (10 if kills >= LONG else 3) * kills
    assert facts["acknowledged"] >= enough, "a storm that saw nothing proves nothing"
    assert (facts["lost"], facts["duplicated"], facts["stuck"]) == (0, 0, 0), facts
    assert not [path for path in tmp_path.glob("*/storage/checkpoints/**/*") if path.is_file()]
    assert 1 not in facts["exit codes"], "a traceback"


def counted(storm: Storm) -> Counter[str]:
    """What its searches showed against what its database holds."""
    url = default_url(storm.folder / "storage")
    assert not examine(url).problems
    figures = Counter(
        lost=0, duplicated=0, acknowledged=0, failed=0, trials=0, stuck=storm.stuck, studies=storm.studies
    )
    for number in range(storm.studies):
        name = f"demo@{number + 1}"
        records = {record.number: record for record in trial_records(stored_study(url, name))}
        epochs, values, ends, states = acknowledged(storm.folder / f"{name}.log")
        figures["acknowledged"] += len(epochs) + len(ends)
        figures["duplicated"] += sum(n > 1 for n in (*epochs.values(), *ends.values()))
        stored = {
            (record.number, epoch.epoch): f"{epoch.validation_top1:.3f}"
            for record in records.values()
            for epoch in record.epochs
        }
        figures["lost"] += sum(stored.get(key) != value for key, value in values.items())
        figures["lost"] += sum(records[trial].state != state for trial, state in states.items())
        finished = [record for record in records.values() if record.state in ("complete", "pruned")]
        assert len(finished) == storm.trials
        assert not [record for record in records.values() if record.state == "running"]
        assert Counter(r.baseline for r in finished if r.baseline) == {
            "by hand: LR 0.05, 6 epochs, step 4": 1
        }
        figures["failed"] += sum(record.state == "failed" for record in records.values())
        figures["trials"] += len(finished)
    return figures
