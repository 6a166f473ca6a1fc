"""A PostgreSQL server of the test's own, on loopback: the lock, broken connections, passwords."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from made_studies import searched

from caltech_hpo.errors import StorageError
from caltech_hpo.search.locks import holders_of, study_lock
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.storage import open_storage, stored_study

COMMAND = str(Path(sys.executable).with_name("caltech-hpo"))
PASSWORD = "geheim@wort/1"
ESCAPED = "geheim%40wort%2F1"


def binaries() -> Path | None:
    """The newest server's programs; Debian keeps them off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def account() -> str | None:
    """The server refuses to run as root; the package brings an account."""
    if os.geteuid() != 0:
        return None
    return next((entry.pw_name for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody")), None)


class Server:
    """A cluster in a folder of its own."""

    def __init__(self, folder: Path, programs: Path, user: str | None) -> None:
        self.folder, self.programs, self.user = folder, programs, user
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "password").write_text(PASSWORD)
        if user:
            shutil.chown(folder, user)
            shutil.chown(folder / "password", user)
        self.run("initdb", "-U", "me", "--pwfile", folder / "password", "-A", "scram-sha-256", "--no-sync")

    def run(self, program, *arguments) -> None:
        command = [self.programs / program, "-D", self.folder / "data", *arguments]
        subprocess.run(
            command, check=True, user=self.user, cwd=self.folder, stdout=subprocess.DEVNULL, timeout=120
        )

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -c unix_socket_directories='' -c fsync=off"
        self.run("pg_ctl", "-w", "-l", self.folder / "log", "-o", options, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-w", "-m", "immediate", "stop")

    @property
    def url(self) -> str:
        return f"postgresql://me:{ESCAPED}@127.0.0.1:{self.port}/postgres"


@pytest.fixture(scope="module")
def server():
    programs = binaries()
    if programs is None:
        pytest.skip("needs PostgreSQL's server programs (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    made = Server(folder, programs, account())
    made.start()
    yield made
    made.stop()
    shutil.rmtree(folder)


def curve(trial, epoch):
    return 0.1 * trial % 0.7 + 0.01 * epoch


def test_a_study_on_postgresql_is_the_study_on_sqlite(server, tmp_path):
    _, ours = searched(tmp_path, curve, trials=5, url=server.url)
    _, theirs = searched(tmp_path / "sqlite", curve, trials=5)
    assert [(r.state, r.params, r.value, r.epochs) for r in ours] == [
        (r.state, r.params, r.value, r.epochs) for r in theirs
    ]
    _, more = searched(tmp_path, curve, trials=7, url=server.url)
    assert len(more) == 7 and more[:5] == ours


def test_the_lock_says_who_holds_it_and_ends_with_its_holder(server, tmp_path):
    code = "import sys; from pathlib import Path; from caltech_hpo.search.locks import study_lock\n"
    code += (
        "with study_lock(sys.argv[1], Path('x'), 'demo', 'x'): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, server.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError) as raised, study_lock(server.url, tmp_path, "demo", "search"):
            pass
        assert f"another search is running: process {holder.pid} on" in str(raised.value)
        found = holders_of(server.url, tmp_path, ["demo", "demo@2"])
        assert found.keys() == {"demo"} and found["demo"].startswith(f"process {holder.pid} on ")
        with study_lock(server.url, tmp_path, "demo@2", "search"):
            pass
        holder.kill()
    with study_lock(server.url, tmp_path, "demo", "search") as check:
        check()
    assert not any(tmp_path.iterdir())  # no lock files


def test_a_lost_lock_is_taken_again_or_ends_the_search(server, tmp_path):
    with study_lock(server.url, tmp_path, "lost", "search") as check:
        server.stop()
        with pytest.raises(StorageError, match="does not answer") as raised:
            check()
        assert "geheim" not in str(raised.value)
        server.start()
        check()
        with (
            pytest.raises(StorageError, match="another search"),
            study_lock(server.url, tmp_path, "lost", "search"),
        ):
            pass
        server.stop()
        server.start()
        with study_lock(server.url, tmp_path, "lost", "search"), pytest.raises(StorageError, match="another"):
            check()
        # even when that one has ended, what it wrote is not known to the first
        with pytest.raises(StorageError, match="ran meanwhile"):
            check()


def test_a_connection_that_broke_between_two_uses_is_made_anew(server):
    storage = open_storage(server.url)
    before = len(storage.get_all_studies())
    server.stop()
    server.start()
    assert len(storage.get_all_studies()) == before


def command(*arguments, url, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CALTECH_HPO_")} | variables
    return subprocess.run(
        [COMMAND, *arguments], env=environment | {"CALTECH_HPO_STORAGE": url}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def test_passwords_show_nowhere(server, tmp_path):
    searched(tmp_path, curve, trials=2, url=server.url, name="alexnet-scratch")
    wrong = server.url.replace("geheim", "geheimer")
    unescaped = server.url.replace("%40", "@")
    asked = server.url.replace(f":{ESCAPED}@", "@") + f"?password={ESCAPED}"
    odd = server.url.replace(ESCAPED, "geheim?b@wort")
    for url, code in (
        (odd, 4),
        (server.url, 0),
        (asked, 0),
        (wrong, 4),
        (unescaped, 4),
        (server.url[:-9] + "/none", 4),
    ):
        done = command("studies", "--home", str(tmp_path), url=url)
        assert done.returncode == code, done.stderr
        assert "geheim" not in done.stdout + done.stderr and "wort" not in done.stdout + done.stderr
    done = command("studies", "--storage", server.url, url="")
    assert done.returncode == 2 and "CALTECH_HPO_STORAGE" in done.stderr and "geheim" not in done.stderr
    dump = subprocess.run(
        [server.programs / "pg_dump", "--data-only", server.url], capture_output=True, text=True, check=True
    )
    assert "alexnet-scratch" in dump.stdout and "geheim" not in dump.stdout and ESCAPED not in dump.stdout


def test_storage_commands_on_a_server(server, tmp_path):
    searched(tmp_path, curve, trials=2, url=server.url, name="vgg16-transfer")
    assert len(trial_records(stored_study(server.url, "vgg16-transfer"))) >= 2
    done = command("storage", "check", url=server.url)
    assert done.returncode == 0 and "test scores" in done.stdout, done.stdout + done.stderr
    done = command("storage", "backup", url=server.url)
    assert done.returncode == 4 and "pg_dump" in done.stderr
    assert command("storage", "upgrade", url=server.url).returncode == 0
