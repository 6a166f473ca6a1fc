"""The queue: what is submitted is run once, in order, by one `serve`, and goes on after its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request

import pytest
from commands import COMMAND, answer, environment, here
from helpers import write_folders
from made_studies import searched
from rich.console import Console
from typer.testing import CliRunner

from caltech_hpo.errors import SpecError, UsageError
from caltech_hpo.results import service
from caltech_hpo.results.status import read_status
from caltech_hpo.results.work_queue import (
    Options,
    cancel,
    change,
    next_submission,
    submission,
    submissions,
    submit,
)
from caltech_hpo.search.locks import confirm_lock, final_lock, study_lock
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import open_storage
from caltech_hpo.search.urls import default_url
from caltech_hpo.study_files import STUDY_NAME


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "home", default_url(tmp_path / "home"))


def test_the_oldest_comes_first_and_what_ran_before_all(place):
    assert submissions(place.storage) == []
    first, second, third = (
        submit(place.storage, "demo", trials, Options(seed=1, enqueue=("a=1",), weights="/w.pth"))
        for trials in (1, 2, 3)
    )
    assert (first.state, first.cancel) == ("waiting", False)
    assert first.options.arguments() == ["--weights=/w.pth", "--seed=1", "--enqueue=a=1"]
    more = Options(baselines=False, skip_unreadable=True)
    assert more.arguments() == ["--no-baselines", "--skip-unreadable"]
    storage = open_storage(place.storage)
    assert next_submission(storage) == first
    assert next_submission(storage, besides={first.id}).id == second.id
    change(storage.engine, third.id, state="running")
    assert next_submission(storage).id == third.id
    assert cancel(place.storage, second.id).state == "cancelled"
    ending = cancel(place.storage, third.id)
    assert (ending.state, ending.cancel, ending.ended) == ("running", True, False)
    for number, words in ((second.id, "is cancelled"), (99, "no submission 99")):
        with pytest.raises(UsageError, match=words):
            cancel(place.storage, number)
    assert [one.id for one in submissions(place.storage)] == [first.id, second.id, third.id]


class Runs:
    """Takes the place of a search's process: each call ends with the next code and output."""

    def __init__(self, monkeypatch, *endings):
        self.endings, self.commands = list(endings), []
        monkeypatch.setattr(service.Service, "_search", self.search)
        monkeypatch.setattr(service, "LOOK_EVERY", 0.01)

    def search(self, found, stop):
        self.commands.append(found.id)
        code, why, output = self.endings.pop(0)
        path = self.service.log_of(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as log:
            log.write(output)
        return code, why

    def run(self, place):
        self.service = service.Service(place, 1, "cpu", lambda text: None)
        self.service.run(lambda: not self.endings)


@pytest.mark.parametrize(
    ("code", "why", "output", "state", "message"),
    [
        (0, "", "", "done", ""),
        (2, "", "hello\nerror: bad\n  fix: y\n", "failed", "bad"),
        (-9, "", "", "failed", "ended with exit code -9"),
        (143, "stop", "", "running", "paused; goes on when serve does"),
        (143, "cancel", "", "cancelled", "its trials stay"),
        (4, "", "error: another search on study 'demo' is running: process 7\n", "waiting", "another search"),
        (4, "", "error: studies.db: not a database\n", "failed", "studies.db: not a database"),
    ],
)
def test_what_becomes_of_a_search(place, monkeypatch, code, why, output, state, message):
    made = submit(place.storage, "demo", 3)
    Runs(monkeypatch, (code, why, output)).run(place)
    after = submission(open_storage(place.storage), made.id)
    assert after.state == state and after.message.startswith(message)
    assert bool(after.ended_at) == after.ended and after.began_at


def test_an_earlier_searchs_error_is_not_this_ones(place, monkeypatch):
    made = submit(place.storage, "demo", 3)
    held = "error: another search on study 'demo' is running: process 7\n"
    monkeypatch.setattr(service, "RETRY_AFTER", 0.0)
    Runs(monkeypatch, (4, "", held), (-9, "", "killed\n")).run(place)
    after = submission(open_storage(place.storage), made.id)
    assert (after.state, after.message) == ("failed", "ended with exit code -9")


def test_one_that_was_cancelled_while_serve_was_away_does_not_begin(place, monkeypatch):
    numbers = [submit(place.storage, "demo", 3).id for _ in range(2)]
    change(open_storage(place.storage).engine, numbers[0], state="running")
    cancel(place.storage, numbers[0])
    runs = Runs(monkeypatch, (0, "", ""))
    runs.run(place)
    assert runs.commands == numbers[1:]
    assert [one.state for one in submissions(place.storage)] == ["cancelled", "done"]


def test_status_shows_queue_and_studies(place):
    searched(place.home, lambda trial, epoch: 0.1 * trial + 0.01 * epoch, trials=3)
    for number in range(8):
        made = submit(place.storage, "demo", number + 1)
        change(open_storage(place.storage).engine, made.id, state="done" if number < 6 else "waiting")
    made = read_status(place)
    assert [one.id for one in made.queue] == [2, 3, 4, 5, 6, 7, 8]  # of those that have ended, the last five
    (study,) = made.studies
    assert (study.study, study.finished, study.best_trial, study.running) == ("demo", 3, 2, ())


def test_status_says_who_confirms_and_who_takes_the_test_score(place):
    from caltech_hpo.cli.queue_commands import _status

    searched(place.home, lambda trial, epoch: 0.1, trials=1)
    (study,) = read_status(place).studies
    assert (study.searched_by, study.confirmed_by, study.final_by) == (None, None, None)
    with confirm_lock(place.storage, place.home, "demo"), final_lock(place.storage, place.home, "demo@2"):
        made = read_status(place)
    (study,) = made.studies
    assert study.searched_by is None
    assert f"process {os.getpid()} on " in study.confirmed_by and study.final_by
    console = Console(width=200, record=True)
    console.print(_status(made))
    shown = console.export_text()
    assert "confirm of demo: process" in shown and "final of demo: process" in shown


def test_a_study_may_be_called_serve(place):
    names = ("serve", "final-demo", "confirm-demo")
    with study_lock(place.storage, place.home, "+serve", "serve"), contextlib.ExitStack() as stack:
        for name in names:
            assert STUDY_NAME.fullmatch(name)
            stack.enter_context(study_lock(place.storage, place.home, name, "search"))
    assert not STUDY_NAME.fullmatch("+serve")


def test_what_search_would_refuse_is_not_submitted(tmp_path, monkeypatch):
    from caltech_hpo.cli.app import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "faulty.toml").write_text("x = 1")
    for study, error in (("none", UsageError), ("faulty", SpecError)):
        done = CliRunner().invoke(app, ["submit", "--study", study])
        assert isinstance(done.exception, error)
    assert not (tmp_path / "storage").exists()


def test_serve_runs_the_queue_and_goes_on_after_its_end(tmp_path):
    images = write_folders(tmp_path / "images", images=12)

    def told():
        return answer("status", cwd=tmp_path, run=here)

    def states():
        return [one["state"] for one in told()["queue"]]

    values = "learning_rate=0.01,epochs=20,batch_size=32,augmentation=center_crop"
    options = ["--data", str(images), "--no-baselines", "--enqueue", values]
    answer("submit", "--study", "demo", "--trials", "1", *options, cwd=tmp_path, run=here)

    def serving():
        command = [COMMAND, "serve", "--port", "0", "--device", "cpu"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)

    with serving() as first:
        url = next(line for line in first.stderr if "dashboard: http" in line).split()[1]
        with urllib.request.urlopen(f"{url}api/studies", timeout=30) as reply:
            assert reply.status == 200
        refused = here("serve", "--port", "0", cwd=tmp_path)
        assert refused.returncode == 4 and "another serve" in refused.stderr
        assert f"process {first.pid} on " in told()["served_by"]
        log = tmp_path / "storage" / "logs" / "submission-1.log"
        while not (log.exists() and " epoch 2/20" in log.read_text()):
            assert first.poll() is None
            time.sleep(0.1)
        (study,) = told()["studies"]
        assert study["searched_by"].startswith("process ") and len(study["running"]) == 1
        first.kill()
    while "paused; the same command" not in log.read_text():  # its search notices
        time.sleep(0.1)
    assert states() == ["running"]
    while told()["studies"][0]["searched_by"]:  # it ends now
        time.sleep(0.1)
    shown = " ".join(here("status", cwd=tmp_path).stdout.split())
    assert "nothing works on the queue now" in shown and "nobody: waiting" in shown
    assert told()["served_by"] is None
    submitted = here("submit", "--study", "demo@2", "--trials", "1", *options, cwd=tmp_path)
    assert submitted.returncode == 0 and "'caltech-hpo serve' does" in submitted.stderr
    with serving() as second:
        assert next(line for line in second.stderr if "submission 1: done" in line)
        assert log.read_text().count(" goes on: ") == 1  # the same trial
        log = tmp_path / "storage" / "logs" / "submission-2.log"
        while not (log.exists() and " starts: " in log.read_text()):
            assert second.poll() is None
            time.sleep(0.1)
        second.send_signal(signal.SIGTERM)
        assert "paused; goes on" in second.stderr.read()
        assert second.wait(timeout=40) == 143
    assert states() == ["done", "running"]
    found = {one["study"]: one["finished"] for one in told()["studies"]}
    assert found == {"demo": 1, "demo@2": 0}
