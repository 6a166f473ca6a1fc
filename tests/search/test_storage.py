"""The study database: what is refused, the lock, and a study that has changed."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from caltech_hpo.cli import is_database_error, reason_of
from caltech_hpo.errors import StorageError, UsageError
from caltech_hpo.ranges import Choices, FloatRange
from caltech_hpo.search import storage
from caltech_hpo.search.changes import check_unchanged
from caltech_hpo.search.locks import held, holders_of, lock_path, study_lock
from caltech_hpo.search.maintenance import backup, examine
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import find_study, open_existing, open_storage, open_study, study_names
from caltech_hpo.search.urls import default_url, refuse_password, shown, sqlite_path
from caltech_hpo.spec import FIRST_FIELDS, Recipe, digest
from caltech_hpo.study_files import load_study


@pytest.fixture
def url(tmp_path):
    return default_url(tmp_path)


def test_a_database_is_made_and_found_again(url, tmp_path):
    assert open_existing(url) is None and not (tmp_path / "studies.db").exists()
    storage = open_storage(url)
    open_study(storage, "demo", load_study("demo"), "x", sampler_seed=0, allow_changed=False)
    again = open_existing(url)
    assert study_names(again) == ["demo"]
    study = find_study(again, "demo")
    assert study.metric_names == ["validation top-1 accuracy"]
    assert study.user_attrs["spec_hash"] == load_study("demo").hash
    assert find_study(again, "absent") is None


@pytest.mark.parametrize("kind", ["empty", "text", "folder", "other program", "damaged"])
def test_what_is_no_study_database_is_refused_and_left_alone(url, tmp_path, kind):
    path = tmp_path / "studies.db"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("these are my notes, not a database\n" * 100)
    elif kind == "folder":
        path.mkdir()
    elif kind == "other program":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.close()
    else:
        open_storage(url)
        path.write_bytes(path.read_bytes()[:1000] + b"\xff" * 5000)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StorageError, match=r"studies\.db"):
        open_storage(url)
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        "sqlite:////proc/none/x.db",
        "sqlite://",
        "sqlite:///:memory:",
        "foo://x",
        "postgresql+psycopg://me:secret@127.0.0.1:9/db",
        "postgresql://me:secret@host:abc/db",
    ],
)
def test_a_url_that_cannot_be_opened(bad):
    with pytest.raises(StorageError) as raised:
        open_storage(bad)
    assert "secret" not in str(raised.value)


def test_passwords_are_hidden(tmp_path):
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert shown(default_url(tmp_path)) == str(tmp_path / "studies.db")


@pytest.mark.parametrize(
    "bad", ["me:pa?ss@host/db", "me:pa@host/db", "me@host/db?password=pa", "me@host/db?x=1&pass%77ord=pa"]
)
def test_passwords_on_the_command_line_are_refused(bad):
    with pytest.raises(UsageError, match="CALTECH_HPO_STORAGE") as refused:
        refuse_password(f"postgresql://{bad}")
    assert "pa?ss" not in str(refused.value)


@pytest.mark.parametrize(
    "good", ["postgresql://me@host:5432/db", "postgresql:///db?host=/run", "sqlite:////a:b@c/d"]
)
def test_urls_without_a_password_are_not(good):
    refuse_password(good)


def test_who_holds_a_lock_can_be_asked(url, tmp_path):
    def asked():
        return holders_of(url, tmp_path, ["demo", "demo@2"]).get("demo")

    path = lock_path(url, tmp_path, "demo")
    assert asked() is None and not path.parent.exists()  # asking makes no file
    with study_lock(url, tmp_path, "demo", "search"):
        assert asked().startswith(f"process {os.getpid()} on ")
        written = json.loads(path.read_text())
    assert asked() is None
    for change, held_by in (
        ({}, f"process {os.getpid()} on"),
        ({"process": 2**22 + 1}, None),  # killed: its number is nobody's
        ({"since": "2001-01-01T00:00:00+00:00"}, None),  # or another's by now
        ({"host": "elsewhere"}, f"process {os.getpid()} on elsewhere, since"),  # who knows
        ({"since": None}, None),
    ):
        path.write_text(json.dumps(written | change))
        found = asked()
        assert found is None if held_by is None else found.startswith(held_by)


def test_who_has_just_taken_a_lock_is_named_once_they_have_written_who_they_are(tmp_path):
    path = tmp_path / "a.lock"
    with FileLock(path), ThreadPoolExecutor() as other:
        name = json.dumps({"process": 7, "host": "h", "since": "2026-01-01"})
        late = other.submit(lambda: (time.sleep(0.2), path.write_text(name)))
        with pytest.raises(StorageError, match="process 7 on h, since 2026"), held(path, "search"):
            pass
        late.result()
    with held(path, "search"):
        assert "process" in path.read_text()
    assert path.read_text() == ""  # nobody takes the next holder for this one


def test_a_link_to_a_database_has_its_lock(url, tmp_path):
    open_storage(url)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.db").symlink_to(tmp_path / "studies.db")
    link = f"sqlite:///{tmp_path}/elsewhere/link.db"
    assert lock_path(link, tmp_path, "demo") == lock_path(url, tmp_path, "demo")


def test_databases_do_not_share_what_is_kept_by_study_name(tmp_path):
    urls = [default_url(tmp_path), f"sqlite:///{tmp_path}/b.db", "postgresql://u:a@h/d", "postgresql://h/e"]
    places = [Place(tmp_path, url) for url in urls]
    for folders in ({place.checkpoints for place in places}, {place.best_weights for place in places}):
        assert len(folders) == 4
    assert places[0].checkpoints == tmp_path / "checkpoints" and places[0].best_weights == places[0].models
    assert Place(tmp_path, urls[2].replace(":a@", ":b@")).checkpoints == places[2].checkpoints


def test_one_supervisor_a_study(tmp_path):
    path = tmp_path / "locks" / "a.lock"
    code = "import sys; from pathlib import Path; from caltech_hpo.search.locks import held\n"
    code += "with held(Path(sys.argv[1]), 'x'): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=f"running: process {holder.pid} on"), held(path, "search"):
            pass
        with held(path.with_name("b.lock"), "search"):
            pass
        holder.kill()
        holder.wait()
    with held(path, "search"):  # the system released it
        pass


def test_an_error_of_sqlite_names_the_file(url, tmp_path, monkeypatch):
    open_storage(url)
    monkeypatch.setattr(storage, "BUSY_TIMEOUT", 0.1)
    ours = open_storage(url)
    with contextlib.closing(sqlite3.connect(tmp_path / "studies.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Exception) as raised:
            ours.get_all_studies()
    assert is_database_error(raised.value)
    assert reason_of(raised.value) == f"{tmp_path}/studies.db: database is locked"


KILLED_WHILE_IT_COMMITS = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size=1")  # pages go to the file at once, as in the midst of a commit
connection.execute("BEGIN IMMEDIATE")
connection.execute("CREATE TABLE half (value)")
connection.executemany("INSERT INTO half VALUES (?)", [("x" * 4000,)] * 200)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def torn(url, tmp_path):
    """A database whose writer was killed while it wrote the file: its journal must be rolled back."""
    storage = open_storage(url)
    open_study(storage, "demo", load_study("demo"), "x", sampler_seed=0, allow_changed=False)
    storage.engine.dispose()
    path = tmp_path / "studies.db"
    before = path.stat().st_size
    subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_COMMITS, str(path)], check=False)
    assert path.with_name("studies.db-journal").stat().st_size and path.stat().st_size > before
    return path


@pytest.mark.parametrize("first", ["open", "read", "check", "backup"])
def test_what_a_killed_writer_left_is_rolled_back(torn, url, tmp_path, first):
    if first == "open":
        open_storage(url)
    elif first == "read":
        assert study_names(open_existing(url)) == ["demo"]
    elif first == "check":
        assert not examine(url).problems
    else:
        backup(url, tmp_path / "copy.db")
    assert not torn.with_name("studies.db-journal").exists()
    with contextlib.closing(sqlite3.connect(torn)) as connection:
        assert not list(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'half'"))
    assert study_names(open_existing(url)) == ["demo"]


def test_a_journal_that_cannot_be_rolled_back_is_no_damage(torn, url, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(  # as on a folder that cannot be written
        "sqlite3.connect", lambda url, **options: connect(url.replace("mode=rw", "mode=ro"), **options)
    )
    with pytest.raises(StorageError, match=r"killed while it wrote(.|\n)*can be written"):
        open_storage(url)


def test_who_makes_a_database_and_is_killed_leaves_none(url, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            open_storage(url)
    assert open_existing(url) is None
    (tmp_path / ".studies.db.new").write_bytes(b"")  # what another kill may leave
    assert study_names(open_storage(url)) == []
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["studies.db"]


def test_all_who_use_a_database_file_meet_at_its_lock(url, tmp_path):
    locks = {lock_path(url, tmp_path / home, "demo") for home in ("one", "two")}
    assert len(locks) == 1
    assert lock_path(url, tmp_path, "demo") != lock_path(url, tmp_path, "demo@2")
    server = "postgresql://me@host/db"
    assert lock_path(server, tmp_path, "demo") == tmp_path / "locks" / "demo.lock"


def changed(spec, **fields):
    return spec.model_copy(update=fields)


def test_a_changed_study_is_refused_with_the_difference_and_the_ways_out(url):
    storage, spec = open_storage(url), load_study("demo")
    study = open_study(storage, "demo", spec, "x", sampler_seed=0, allow_changed=False)
    check_unchanged(study, "demo", changed(spec, about="other words"), "x", allow_changed=False)
    wider = changed(spec, space=spec.space | {"learning_rate": FloatRange(low=0.01, high=0.5, log=True)})
    with pytest.raises(UsageError) as raised:
        open_study(storage, "demo", wider, "x", sampler_seed=0, allow_changed=False)
    message = str(raised.value)
    assert "space.learning_rate.low: 0.001 -> 0.01" in message
    assert "--study demo@2" in message and "--allow-changed" in message
    study = open_study(storage, "demo", wider, "x", sampler_seed=0, allow_changed=True)
    assert study.user_attrs["spec_hash"] == wider.hash
    check_unchanged(study, "demo", wider, "x", allow_changed=False)


def test_changed_choices_cannot_be_mixed(url):
    storage, spec = open_storage(url), load_study("demo")
    study = open_study(storage, "demo@2", spec, "x", sampler_seed=0, allow_changed=False)
    other = changed(spec, space=spec.space | {"batch_size": Choices(choices=(32, 64))})
    with pytest.raises(UsageError, match=r"cannot be mixed(.|\n)*batch_size(.|\n)*demo@3"):
        check_unchanged(study, "demo@2", other, "x", allow_changed=True)


def test_a_comparison_by_percent_cannot_be_mixed_with_one_by_epoch(url):
    storage, spec = open_storage(url), load_study("demo")
    study = open_study(storage, "demo", spec, "x", sampler_seed=0, allow_changed=False)
    other = changed(spec, pruner=spec.pruner.model_copy(update={"compare_at": "fraction"}))
    assert other.hash != spec.hash
    with pytest.raises(UsageError, match=r'cannot be mixed(.|\n)*compare_at: "epoch" -> "fraction"'):
        check_unchanged(study, "demo", other, "x", allow_changed=True)


def test_a_field_that_is_younger_than_the_study_is_no_change(url):
    storage, spec = open_storage(url), load_study("demo")
    study = open_study(storage, "demo", spec, "x", sampler_seed=0, allow_changed=False)
    old = json.loads(study.user_attrs["spec"])
    del old["pruner"]["compare_at"], old["recipe"]["gamma"]  # as an earlier version wrote it
    study.set_user_attr("spec", json.dumps(old))
    check_unchanged(study, "demo", spec, "x", allow_changed=False)
    recipe = spec.recipe.model_copy(update={"gamma": 0.5})  # but another value than the default is one
    with pytest.raises(UsageError, match=r"recipe.gamma: 0.1 -> 0.5"):
        check_unchanged(study, "demo", changed(spec, recipe=recipe), "x", allow_changed=False)


def test_a_stored_spec_that_is_no_longer_valid_is_compared_as_it_is(url):
    storage, spec = open_storage(url), load_study("demo")
    study = open_study(storage, "demo", spec, "x", sampler_seed=0, allow_changed=False)
    study.set_user_attr("spec", json.dumps(json.loads(study.user_attrs["spec"]) | {"retired": 1}))
    with pytest.raises(UsageError, match="retired: 1 -> absent"):
        check_unchanged(study, "demo", spec, "x", allow_changed=False)


def test_studies_and_recipes_made_before_a_field_keep_their_hash():
    spec = load_study("alexnet-scratch")
    document = spec.model_dump(mode="json", exclude={"name", "about", "folder"})
    del document["pruner"]["compare_at"]
    document["recipe"] = {name: document["recipe"][name] for name in FIRST_FIELDS}
    assert spec.hash == digest(document)
    recipe = Recipe(architecture="alexnet", classes=3, data="x")
    first = {*FIRST_FIELDS, "classes", "seed", "data", "fit_on", "weights_sha256"}
    assert recipe.hash == digest(recipe.model_dump(mode="json", include=first))
    assert recipe.model_copy(update={"label_smoothing": 0.1}).hash != recipe.hash


def test_a_locked_database_is_not_called_damaged(url, tmp_path, monkeypatch):
    open_storage(url)
    monkeypatch.setattr("caltech_hpo.search.storage.BUSY_TIMEOUT", 0.2)
    with contextlib.closing(sqlite3.connect(tmp_path / "studies.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="another program has held the database"):
            open_storage(url)


def test_other_data_is_refused(url):
    storage, spec = open_storage(url), load_study("demo")
    study = open_study(storage, "demo", spec, "x", sampler_seed=0, allow_changed=False)
    check_unchanged(study, "demo", spec, None, allow_changed=False)
    for allowed in (False, True):  # accuracies on different images cannot be compared
        with pytest.raises(UsageError, match="data set: x -> y") as raised:
            check_unchanged(study, "demo", spec, "y", allow_changed=allowed)
        assert "--allow-changed" not in str(raised.value)  # it would be refused as well


def test_a_sqlite_url_takes_no_options():
    with pytest.raises(StorageError, match="takes no options") as raised:
        sqlite_path("sqlite:///x.db?password=secret")
    assert "secret" not in str(raised.value)
