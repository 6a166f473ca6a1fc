"""The study database copied, examined, upgraded; and read where nothing can be written."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from made_studies import searched

from caltech_hpo.errors import StorageError
from caltech_hpo.search.locks import CONFIRM, FINAL, SERVE, all_locks, holders_of, study_lock
from caltech_hpo.search.maintenance import backup, examine, upgrade
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.storage import open_storage, stored_study
from caltech_hpo.search.urls import default_url

COMMAND = str(Path(sys.executable).with_name("caltech-hpo"))


def curve(trial, epoch):
    return 0.1 * trial % 0.7 + 0.01 * epoch


@pytest.fixture
def home(tmp_path):
    searched(tmp_path, curve, trials=4)
    return tmp_path


def run(*arguments, prefix=(), cwd=None):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CALTECH_HPO_")}
    return subprocess.run(
        [*prefix, COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=120, cwd=cwd
    )


def test_a_backup_while_another_program_writes_is_whole(home):
    url, stop = default_url(home), threading.Event()

    def write():
        with sqlite3.connect(home / "studies.db", timeout=60) as connection:
            connection.execute("CREATE TABLE other (value)")
            while not stop.is_set():
                connection.execute("INSERT INTO other VALUES (1)")
                connection.commit()
        connection.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(3):
            backup(url, home / f"copy-{number}.db")
    finally:
        stop.set()
        writer.join()
    original = trial_records(stored_study(url, "demo"))
    for number in range(3):
        assert trial_records(stored_study(f"sqlite:///{home}/copy-{number}.db", "demo")) == original
    assert not list(home.glob("*.tmp*"))
    with pytest.raises(StorageError, match=r"copy-0\.db: is there already"):
        backup(url, home / "copy-0.db")


def test_the_commands(home):
    done = run("storage", "backup", "--home", str(home), "--json")
    copy = Path(json.loads(done.stdout)["backup"])
    assert copy.parent == home / "backups" and copy.stat().st_size == json.loads(done.stdout)["bytes"]
    done = run("storage", "check", "--home", str(home), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["ok"] and (found["studies"], found["trials"]) == (1, 4)
    assert "nothing to do" in run("storage", "upgrade", "--home", str(home)).stdout
    for name in ("backup", "check", "upgrade"):
        done = run("storage", name, "--home", str(home / "elsewhere"))
        assert done.returncode == 4 and "holds no studies" in done.stderr
    assert not (home / "elsewhere").exists()


def damage_page(path):
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 3 + 2000] = bytes(2000)
    path.write_bytes(content)


def drop_epoch(path):
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM trial_system_attributes WHERE key LIKE '%epoch%1' AND trial_id = 2")
    connection.close()


def orphan_row(path):
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO trial_values (trial_id, objective, value_type) VALUES (99, 0, 'FINITE')"
        )
    connection.close()


def change_value(path):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE trial_values SET value = 0.999")
    connection.close()


def spoil_recipe(path):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE trial_system_attributes SET value_json = '{}' WHERE key LIKE '%recipe%'")
    connection.close()


@pytest.mark.parametrize("harm", [damage_page, drop_epoch, orphan_row, change_value, spoil_recipe])
def test_a_check_finds_what_is_wrong(home, harm):
    harm(home / "studies.db")
    assert examine(default_url(home)).problems
    done = run("storage", "check", "--home", str(home))
    assert done.returncode == 4 and not done.stdout.rstrip().endswith("ok")


@pytest.fixture
def older(home):
    """The same database, as an Optuna of some years ago would have made it."""
    from alembic import command

    url = default_url(home)
    storage = open_storage(url)
    with sqlite3.connect(home / "studies.db") as connection:
        connection.execute("CREATE INDEX trials_study_id_key ON trials (study_id)")
    connection.close()
    command.downgrade(storage._version_manager._create_alembic_config(), "v3.0.0.c")
    storage.engine.dispose()
    return home


def test_a_study_and_its_repetition_have_one_lock_of_final(tmp_path):
    url = default_url(tmp_path)
    with all_locks(url, tmp_path, "demo", "demo@2", "other"):
        for name in ("demo", "demo@2", CONFIRM + "demo@2", FINAL + "demo", FINAL + "other"):
            with pytest.raises(StorageError, match="is running"), study_lock(url, tmp_path, name, "search"):
                pass
    assert not holders_of(url, tmp_path, ["demo", FINAL + "demo"])


def test_an_older_schema_is_upgraded_on_command_only(older):
    url = default_url(older)
    before = (older / "studies.db").read_bytes()
    done = run("studies", "--home", str(older))
    assert done.returncode == 4 and "caltech-hpo storage upgrade" in done.stderr
    assert any("v3.0.0.c" in problem for problem in examine(url).problems)
    for name, said in (
        ("demo", "search on study 'demo'"),
        (CONFIRM + "demo", "confirm of study 'demo'"),
        (FINAL + "demo", "final training of study 'demo'"),
        (SERVE, "serve on this database"),
    ):
        with (
            study_lock(url, older, name, "search"),
            pytest.raises(StorageError, match=f"another {said} is run"),
        ):
            upgrade(url, older, older / "backups")
    with study_lock(url, older, "demo", "search"):
        done = run("storage", "upgrade", "--home", str(older))
        assert done.returncode == 4 and "another search on study 'demo' is running" in done.stderr
    assert (older / "studies.db").read_bytes() == before
    done = upgrade(url, older, older / "backups")
    assert done.backup.read_bytes() and (done.before, done.after) == ("v3.0.0.c", examine(url).newest)
    assert not examine(url).problems
    assert len(trial_records(stored_study(url, "demo"))) == 4
    assert examine(f"sqlite:///{done.backup}").schema == "v3.0.0.c"


def test_a_newer_schema_says_what_to_install(home):
    with sqlite3.connect(home / "studies.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.0.0.a'")
    connection.close()
    for command in (("studies",), ("storage", "upgrade")):
        done = run(*command, "--home", str(home))
        assert done.returncode == 4 and "pip install --upgrade optuna" in done.stderr


def without_rights():
    """A command prefix under which the superuser, too, is bound by permissions."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv: permissions do not bind the superuser")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def test_a_read_only_home_can_be_read(home):
    prefix, work = without_rights(), home.parent / "work"
    work.mkdir(exist_ok=True)
    files = [home, *home.rglob("*")]
    for file in files:
        file.chmod(0o555 if file.is_dir() else 0o444)
    try:
        for command in (
            ("studies",), ("storage", "check"), ("report", "--all", "--output", str(work / "report")),
        ):  # fmt: skip
            done = run(*command, "--home", str(home), prefix=prefix)
            assert done.returncode == 0, (command, done.stderr)
            assert "demo" in done.stdout + done.stderr or "report" in done.stdout or "ok" in done.stdout
        assert (
            "curves.png: Permission denied"
            in run("report", "--study", "demo", "--home", str(home), prefix=prefix).stdout
        )
        for command in (
            ("search", "--study", "demo", "--trials", "9"), ("report", "--all"),
        ):  # fmt: skip
            done = run(*command, "--home", str(home), prefix=prefix)
            assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
            assert "fix:" in done.stderr
    finally:
        for file in files:
            file.chmod(0o755 if file.is_dir() else 0o644)
