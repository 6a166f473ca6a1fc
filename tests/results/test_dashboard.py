"""The dashboard: who gets in, what can be written, what browsers are told, over all of its routes."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import optuna
import optuna_dashboard
import pytest
from asking import app_of, call
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from typer.testing import CliRunner

from caltech_hpo.errors import UsageError
from caltech_hpo.results import dashboard
from caltech_hpo.results.guard import SANDBOX, access_to, host_name
from caltech_hpo.search.locks import CONFIRM, FINAL, study_lock
from caltech_hpo.search.storage import open_storage
from caltech_hpo.search.urls import default_url

COMMAND = str(Path(sys.executable).with_name("caltech-hpo"))
TOKEN = "0123456789abcdef"
# Something that every writing route of optuna-dashboard takes.
BODY = {
    "study_name": "new", "directions": ["maximize"], "version": 1, "body": "a note", "state": "Complete",
    "values": [0.99], "user_attrs": {"a": 1}, "file": "data:text/html;base64,aGk=", "filename": "x.html",
    "mode": "ChooseWorst", "candidates": [0, 1], "clicked": 1, "output_type": "note",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    """A user's own token must not reach the tests."""
    monkeypatch.delenv("CALTECH_HPO_TOKEN", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A home with a study of two finished trials and one that runs, and artifacts: HTML, SVG."""
    home = tmp_path_factory.mktemp("home")
    url = f"sqlite:///{home / 'studies.db'}"
    storage = open_storage(url)
    study = optuna.create_study(study_name="demo", storage=storage, direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    running = study.ask()
    running.suggest_float("x", 0, 1)
    store = FileSystemArtifactStore(home / "artifacts")
    (home / "artifacts").mkdir()
    (home / "page.html").write_text("<script>alert(1)</script>")
    (home / "plot.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    add = {"artifact_store": store, "storage": storage}
    page = upload_artifact(file_path=str(home / "page.html"), study_or_trial=study, **add)
    plot = upload_artifact(file_path=str(home / "plot.svg"), study_or_trial=running, **add)
    storage.engine.dispose()
    return SimpleNamespace(home=home, study=study._study_id, trial=running._trial_id, page=page, plot=plot)


@pytest.fixture
def copied(made, tmp_path):
    """The same, for tests that write."""
    home = shutil.copytree(made.home, tmp_path / "home")
    return SimpleNamespace(**vars(made) | {"home": home})


def unguarded(made):
    """optuna-dashboard as it comes."""
    store = FileSystemArtifactStore(made.home / "artifacts")
    return optuna_dashboard.wsgi(open_storage(f"sqlite:///{made.home / 'studies.db'}"), artifact_store=store)


def contents(made):
    """All that a request could change: the database's rows, the artifact files."""
    with sqlite3.connect(f"file:{made.home / 'studies.db'}?mode=ro", uri=True) as connection:
        rows = list(connection.iterdump())
    connection.close()
    return rows, sorted((path.name, path.read_bytes()) for path in (made.home / "artifacts").iterdir())


def routes(made):
    """Method and path of each of optuna-dashboard's routes, with the study's own numbers filled in."""
    values = {
        "study_id": made.study, "trial_id": made.trial, "artifact_id": made.page, "history_id": "x",
        "plot_type": "edf", "filename": "bundle.js", "": "/studies/1",
    }  # fmt: skip
    filled = [
        (
            route.method,
            re.sub(r"<(\w*)(:[^<>]*)?>", lambda match: str(values[match[1]]), route.rule),
        )
        for route in unguarded(made).routes
    ]
    assert len(filled) > 30 and {"GET", "POST", "PUT", "DELETE"} == {method for method, _ in filled}
    return filled


WRITES_ALLOWED = {
    "PUT": r".*/note",
    "POST": r"/api/artifacts/.*",
    "DELETE": r"/api/(studies/\d+|artifacts/.*)",
}


def test_no_route_writes_when_reading(made):
    """None of the routes that are not GET only reads, so that all of them are refused."""
    app, before = app_of(made), contents(made)
    for method, path in routes(made):
        if method != "GET":
            for spelled in (path, f"{path}/", f"/{path}"):
                reply = call(app, method, spelled, json.dumps(BODY).encode())
                assert reply.status == 403 and "--writable" in json.loads(reply.body)["reason"], (
                    method,
                    spelled,
                )
    for method in ("post", "delete", "PATCH", "TRACE", "CONNECT", "PROXY", "ANY", "ASTERISK", ""):
        assert call(app, method, f"/api/studies/{made.study}").status == 403, method
    assert contents(made) == before


def test_the_same_requests_write_without_the_guard(copied):
    body = json.dumps(BODY).encode()
    for method, path in (
        ("POST", f"/api/trials/{copied.trial}/user-attrs"), ("POST", f"/api/trials/{copied.trial}/tell"),
        ("PUT", f"/api/studies/{copied.study}/note"), ("POST", f"/api/artifacts/{copied.study}"),
        ("DELETE", f"/api/studies/{copied.study}"),
    ):  # fmt: skip
        before = contents(copied)
        assert call(unguarded(copied), method, path, body).status in (201, 204)
        assert contents(copied) != before, path


@pytest.mark.parametrize("writable", [False, True])
def test_every_page_is_shown_and_no_get_writes(copied, writable):
    app, before = app_of(copied, writable=writable), contents(copied)
    shown = set()
    for method, path in routes(copied):
        if method == "GET":
            path = path.replace(copied.page, copied.plot) if path.count("/") == 4 else path
            statuses = {call(app, verb, path, json.dumps(BODY).encode()).status for verb in ("GET", "HEAD")}
            assert statuses <= {200, 302}, (path, statuses)
            call(app, "OPTIONS", path)
            shown.add(path)
    for kind in ("contour", "slice", "parallel_coordinate", "rank", "timeline"):
        assert call(app, path=f"/api/studies/{copied.study}/plot/{kind}").status == 200, kind
    assert {
        "",
        "/dashboard/studies/1",
        f"/csv/{copied.study}",
        f"/artifacts/{copied.study}/{copied.page}",
    } <= {path.rstrip("/") for path in shown}
    for name in ("HTTP_X_HTTP_METHOD_OVERRIDE", "HTTP_X_HTTP_METHOD", "HTTP_X_METHOD_OVERRIDE"):
        for verb in ("GET", "HEAD", "OPTIONS"):
            overridden = {name: "DELETE", "QUERY_STRING": "_method=DELETE"}
            call(app, verb, f"/api/studies/{copied.study}", b"_method=DELETE", **overridden)
    assert contents(copied) == before


def test_writable_allows_notes_artifacts_and_deletes_alone(copied):
    app, body = app_of(copied, writable=True), json.dumps(BODY).encode()
    for method, path in routes(copied):
        if method != "GET" and not re.fullmatch(WRITES_ALLOWED.get(method, ""), path):
            before = contents(copied)
            reply = call(app, method, path, body)
            assert reply.status == 403 and b"nothing else" in reply.body, (method, path)
            assert contents(copied) == before
    for method, path, status in (
        ("PUT", f"/api/studies/{copied.study}/note", 204),
        ("PUT", f"/api/studies/{copied.study}/{copied.trial}/note", 204),
        ("POST", f"/api/artifacts/{copied.study}", 201),
        ("POST", f"/api/artifacts/{copied.study}/{copied.trial}", 201),
        ("DELETE", f"/api/artifacts/{copied.study}/{copied.page}", 204),
        ("DELETE", f"/api/artifacts/{copied.study}/{copied.trial}/{copied.plot}", 204),
        ("DELETE", f"/api/studies/{copied.study}", 204),
    ):
        before = contents(copied)
        assert call(app, method, path, body).status == status, path
        assert contents(copied) != before, path
    assert json.loads(call(app).body)["study_summaries"] == []


@pytest.mark.parametrize(
    "status, headers",
    [
        (204, {}),  # no browser: a script
        (204, {"HTTP_SEC_FETCH_SITE": "same-origin", "HTTP_ORIGIN": "http://localhost:8080"}),
        (204, {"HTTP_ORIGIN": "http://localhost:8080"}),
        (204, {"HTTP_ORIGIN": "https://hpo.example.org", "HTTP_HOST": "hpo.example.org"}),  # a TLS proxy
        (403, {"HTTP_SEC_FETCH_SITE": "cross-site"}),
        (403, {"HTTP_SEC_FETCH_SITE": "same-site"}),
        (403, {"HTTP_SEC_FETCH_SITE": "same-origin", "HTTP_ORIGIN": "https://evil.example"}),
        (403, {"HTTP_ORIGIN": "https://evil.example"}),
        (403, {"HTTP_ORIGIN": "http://localhost:3000"}),
        (403, {"HTTP_ORIGIN": "null"}),
        (403, {"HTTP_ORIGIN": ""}),
        (403, {"HTTP_ORIGIN": "http://localhost:8080.evil.example"}),
    ],
)
def test_other_sites_cannot_write(copied, status, headers):
    token = (
        "Basic " + base64.b64encode(f"me:{TOKEN}".encode()).decode()
    )  # browsers send it along by themselves
    app = app_of(copied, writable=True, token=TOKEN, names=["hpo.example.org"])
    before = contents(copied)
    reply = call(
        app, "PUT", f"/api/studies/{copied.study}/note", json.dumps(BODY).encode(),
        HTTP_AUTHORIZATION=token, **headers,
    )  # fmt: skip
    assert reply.status == status
    assert (contents(copied) == before) == (status == 403)


@pytest.mark.parametrize(
    "listening, host, status",
    [
        ("127.0.0.1", "localhost:8080", 200),
        ("127.0.0.1", "LOCALHOST.", 200),
        ("127.0.0.1", "127.0.0.1:9000", 200),  # ssh -L has another port
        ("127.0.0.1", "[::1]:8080", 200),
        ("127.0.0.1", "[0:0:0:0:0:0:0:1]", 200),
        ("127.0.0.1", "gpu.example.org", 200),  # --allow-host
        ("127.0.0.1", "GPU.example.org.:443", 200),
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.1", "localhost.evil.example", 421),
        ("127.0.0.1", "evil.gpu.example.org", 421),
        ("127.0.0.1", "192.168.1.5", 421),
        ("127.0.0.1", "0.0.0.0:8080", 421),
        ("127.0.0.1", "[::2]", 421),
        ("127.0.0.1", None, 400),
        ("127.0.0.1", "", 400),
        ("127.0.0.1", "::1", 400),
        ("127.0.0.1", "[::1", 400),
        ("127.0.0.1", "[localhost]", 400),
        ("127.0.0.1", "localhost:80:80", 400),
        ("127.0.0.1", "localhost, evil.example", 400),
        ("127.0.0.1", "evil@localhost", 400),
        ("127.0.0.1", "localhost/evil", 400),
        ("127.0.0.1", "localhost\n", 200),
        ("192.168.1.5", "192.168.1.5:8080", 200),
        ("192.168.1.5", "192.168.1.6", 421),
        ("0.0.0.0", "192.168.1.6:8080", 200),  # a rebound name is never an address
        ("0.0.0.0", "[fe80::1]:8080", 200),
        ("0.0.0.0", "evil.example", 421),
        ("0.0.0.0", "2130706433", 421),
        ("::", "10.0.0.1", 200),
    ],
)
def test_the_host_header_is_checked(made, listening, host, status):
    app = app_of(made, host=listening, token=TOKEN, names=["gpu.example.org"])
    bearer = {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}", "HTTP_X_FORWARDED_HOST": "localhost"}
    reply = call(app, HTTP_HOST=host, **bearer)
    assert reply.status == status
    if status != 200:
        assert b"--allow-host" in reply.body and reply.body.count(b"\n") == 1
        assert call(app, HTTP_HOST=host).status == status  # before the token: nothing to be tried out


def test_names_to_allow():
    assert host_name("[::1]:1") == "::1" and host_name("A.b:1") == "a.b" and host_name(".") is None
    assert {"x.y", "::5", "10.0.0.9"} <= access_to(
        "127.0.0.1", "127.0.0.1", None, ["X.Y:8080", "::5", "10.0.0.9"], writable=False
    ).hosts
    for wrong in ("http://x.y", "*", "a b", "x/y", ""):
        with pytest.raises(UsageError, match="no host name"):
            access_to("127.0.0.1", "127.0.0.1", None, [wrong], writable=False)


def basic(text):
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "header, status",
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {TOKEN}", 200),
        (basic(f"me:{TOKEN}"), 200),
        (basic(f":{TOKEN}"), 200),
        (basic(f"me:{TOKEN}").replace("Basic", "BASIC"), 200),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Bearer {TOKEN}0", 401),
        (f"Bearer {TOKEN}, Bearer {TOKEN}", 401),
        (TOKEN, 401),
        (f"Digest {TOKEN}", 401),
        (f"Basic {TOKEN}", 401),
        (basic(TOKEN), 401),
        (basic(f"{TOKEN}:"), 401),
        (basic(f"me:{TOKEN}:"), 401),
        ("Basic !!!", 401),
        ("Basic ä", 401),
        ("Bearer \u2603", 401),
    ],
)
def test_the_token_is_asked(made, header, status):
    app = app_of(made, token=TOKEN)
    for path in (
        "/",
        "/dashboard",
        "/api/studies",
        "/static/bundle.js",
        f"/artifacts/{made.study}/{made.page}",
    ):
        reply = call(app, path=path, HTTP_AUTHORIZATION=header)
        assert reply.status == (status if status == 401 or path != "/" else 302), path
    assert ("www-authenticate" in reply.header) == (status == 401)
    if status == 401:
        assert reply.header["www-authenticate"].startswith("Basic ")
        assert TOKEN.encode() not in reply.body
        assert call(app, "HEAD", HTTP_AUTHORIZATION=header).body == b""
    assert TOKEN not in repr(access_to("::1", "::1", TOKEN, [], writable=False))


@pytest.mark.parametrize(
    "address, token, reason",
    [
        ("127.0.0.1", None, None),
        ("127.8.8.8", None, None),
        ("::1", None, None),
        ("192.168.1.5", TOKEN, None),
        ("0.0.0.0", TOKEN, None),
        ("fe80::1%eth0", TOKEN, None),
        ("192.168.1.5", None, "lets other machines in"),
        ("0.0.0.0", None, "lets other machines in"),
        ("::", None, "lets other machines in"),
        ("fe80::1%eth0", None, "lets other machines in"),
        ("::ffff:192.168.1.5", None, "lets other machines in"),
        ("0.0.0.0", "", "is empty"),
        ("127.0.0.1", "", "is empty"),
        ("127.0.0.1", TOKEN[:-1], "is too short: it needs 16"),
        ("127.0.0.1", f"{TOKEN} {TOKEN}", "no spaces"),
        ("127.0.0.1", f"{TOKEN}\n", "no spaces"),
        ("127.0.0.1", f"{TOKEN}ä", "only ASCII"),
    ],
)
def test_who_needs_a_token(address, token, reason):
    if reason is None:
        assert access_to(address, address, token, [], writable=False).loopback == (
            address in ("127.0.0.1", "127.8.8.8", "::1")
        )
        return
    with pytest.raises(UsageError, match=reason) as refused:
        access_to(address, address, token, [], writable=False)
    assert "export CALTECH_HPO_TOKEN=$(openssl rand -hex 24)" in refused.value.fix
    assert not token or token not in str(refused.value)


def test_artifacts_run_no_scripts(made):
    app = app_of(made)
    for path, kind in (
        (f"/artifacts/{made.study}/{made.page}", "text/html"),
        (f"//artifacts/{made.study}/{made.page}//", "text/html"),
        (f"/artifacts/{made.study}/{made.trial}/{made.plot}", "image/svg+xml"),
    ):
        reply = call(app, path=path, HTTP_ORIGIN="https://evil.example")
        if reply.status == 200:  # without waitress, a double slash is another path
            assert reply.header["content-type"] == kind and b"alert" in reply.body
        assert [value for name, value in reply.headers if name == "content-security-policy"] == [SANDBOX]
        assert [value for name, value in reply.headers if name == "x-content-type-options"] == ["nosniff"]
        assert "access-control-allow-origin" not in reply.header
        assert reply.header["cross-origin-resource-policy"] == "same-origin"
    for path in ("/artifacts/1/../../studies.db", "/artifacts/1/%2e%2e%2fstudies.db", "/artifacts/1/..%5c"):
        assert call(app, path=path).status == 404
    for path in ("/static/../index.html", "/static/../../../../../../etc/passwd", "/static//etc/passwd"):
        assert call(app, path=path).status in (403, 404)


def test_every_reply_is_protected_and_the_page_keeps_its_policy(made):
    app = app_of(made)
    for method, path in (*routes(made), ("GET", "/nothing"), ("GET", "/artifacts/9/9")):
        reply = call(app, method, path)
        assert reply.header["x-content-type-options"] == "nosniff", path
        assert reply.header["referrer-policy"] == "no-referrer" and reply.header["x-frame-options"] == "DENY"
    page = call(app, path="/dashboard")
    again = call(app, path="/dashboard", HTTP_IF_NONE_MATCH=page.header["etag"])  # updates what is cached
    assert (page.status, again.status) == (200, 304)
    for reply in (page, again):
        own, added = (value for name, value in reply.headers if name == "content-security-policy")
        assert (
            "script-src 'self'" in own and "frame-ancestors 'none'" in added and "sandbox" not in own + added
        )
    assert re.search(r"<script(?![^>]*src=)", page.body.decode()) is None  # the policy allows none inline
    bundle = call(app, path="/static/bundle.js")
    assert "javascript" in bundle.header["content-type"]  # nosniff
    # A TLS proxy's scheme, or a forged header, must not end up in a redirect.
    forged = call(app, path="/", HTTP_X_FORWARDED_HOST="evil.example", HTTP_X_FORWARDED_PROTO="https")
    assert forged.header["location"] == "/dashboard"


def test_the_database_itself_refuses_writes_when_reading(copied):
    url = f"sqlite:///{copied.home / 'studies.db'}"
    storage = dashboard.open_studies(url, writable=False)
    with pytest.raises(optuna.exceptions.StorageInternalError) as refused:
        storage.set_study_user_attr(copied.study, "a", 1)
    assert "readonly database" in str(refused.value.__cause__)
    dashboard.open_studies(url, writable=True).set_study_user_attr(copied.study, "a", 1)
    assert storage.get_study_user_attrs(copied.study) == {"a": 1}


def test_reading_makes_nothing(copied):
    shutil.rmtree(copied.home / "artifacts")
    (copied.home / "artifacts").write_text("no folder can be made here")
    before = sorted(path.name for path in copied.home.iterdir())
    assert call(app_of(copied)).status == 200
    assert sorted(path.name for path in copied.home.iterdir()) == before
    with pytest.raises(FileExistsError):
        app_of(copied, writable=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_home_can_be_read(copied):
    (copied.home / "studies.db").chmod(0o444)
    copied.home.chmod(0o555)
    try:
        assert call(app_of(copied)).status == 200
    finally:
        copied.home.chmod(0o755)


def run(*arguments, token=None):
    """The command, in this process."""
    from caltech_hpo.cli.app import app

    environment = {"CALTECH_HPO_TOKEN": token, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["dashboard", *map(str, arguments)], env=environment)


@pytest.mark.parametrize(
    "arguments, token, reason",
    [
        (["--host", "0.0.0.0"], None, "CALTECH_HPO_TOKEN"),
        (["--host", "::"], None, "CALTECH_HPO_TOKEN"),
        (["--host", "0"], None, "CALTECH_HPO_TOKEN"),
        (["--host", "0.0.0.0"], "short", "too short"),
        (["--host", "127.0.0.1"], "", "is empty"),
        ([], "", "is empty"),
        (["--host", ""], TOKEN, "cannot listen on"),
        (["--host", "no..name"], TOKEN, "cannot listen on"),
        (["--allow-host", "https://x"], TOKEN, "no host name"),
    ],
)
def test_the_command_refuses_before_it_listens(tmp_path, monkeypatch, arguments, token, reason):
    def listens(*_, **__):
        raise AssertionError("it listens")

    monkeypatch.setattr(dashboard.socket, "create_server", listens)
    done = run(*arguments, "--home", tmp_path / "home", "--port", 0, token=token)
    assert isinstance(done.exception, UsageError) and reason in str(done.exception)
    assert done.exception.exit_code == 2 and done.exception.fix
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "arguments, token, words, absent",
    [
        ([], None, ["http://127.0.0.1:", "read-only"], ["warning", "asks for"]),
        (["--writable"], TOKEN, ["http://127.0.0.1:", "writable", "asks for"], ["warning", TOKEN]),
        (["--host", "0.0.0.0"], TOKEN, ["http://0.0.0.0:", "not encrypted", "TLS proxy", "ssh -L"], [TOKEN]),
    ],
)
def test_what_the_command_says(copied, monkeypatch, arguments, token, words, absent):
    served = []
    monkeypatch.setattr(
        dashboard, "serve", lambda app, listening, *, writable: served.append((listening, writable))
    )
    done = run(*arguments, "--home", copied.home, "--port", 0, token=token)
    ((listening, writable),) = served
    listening.close()
    assert done.exit_code == 130 and writable == ("--writable" in arguments)
    assert all(word in done.output for word in words) and not any(word in done.output for word in absent)


def test_the_help_says_who_gets_in():
    shown = " ".join(run("--help").output.split())
    for words in ("--writable", "--allow-host", "CALTECH_HPO_TOKEN", "TLS proxy", "ssh -L", "127.0.0.1"):
        assert words in shown


@pytest.fixture(scope="module")
def server(made):
    """The command as a user starts it, with a token; yields its port and its first line."""
    environment = os.environ | {"CALTECH_HPO_TOKEN": TOKEN, "NO_COLOR": "1"}
    command = [COMMAND, "dashboard", "--port", "0", "--home", str(made.home)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if "http://" in line)
            port = urlsplit(next(word for word in line.split() if word.startswith("http://"))).port
            yield SimpleNamespace(port=port, line=line)
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(timeout=20) == 143 and TOKEN not in line + rest and "Traceback" not in rest
        finally:
            process.kill()


def ask(server, method="GET", path="/api/studies", body=None, **headers):
    """A request over HTTP; `Host` and `Authorization` are right unless given."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Accept-Encoding": "identity"} | headers
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply, reply.read()
    finally:
        connection.close()


def test_the_server_answers(server, made):
    status, reply, body = ask(server)
    assert status == 200 and b'"demo"' in body and reply.headers["Server"] is None
    assert ask(server, Authorization=basic(f"me:{TOKEN}"))[0] == 200
    assert ask(server, Authorization="Bearer wrong")[0] == 401
    assert ask(server, Host="evil.example")[0] == 421
    assert ask(server, Host="localhost, evil.example")[0] == 400
    status, reply, body = ask(server, path=f"//artifacts/{made.study}/{made.page}/")
    assert status == 200 and reply.headers.get_all("Content-Security-Policy") == [SANDBOX]
    status, reply, _ = ask(server, path="/", **{"X-Forwarded-Host": "evil.example"})
    assert status == 302 and reply.headers["Location"] == "/dashboard"
    assert ask(server, "HEAD", Host="evil.example")[2] == b""
    taken = run("--port", server.port, "--home", made.home)
    assert isinstance(taken.exception, UsageError) and "cannot listen" in str(taken.exception)


def test_the_server_only_reads_small_requests(server, made):
    before = contents(made)
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        status, _, body = ask(server, method, f"/api/studies/{made.study}", b"{}")
        assert status == 403 and b"--writable" in body
    assert ask(server, "PUT", f"/api/studies/{made.study}/note", b"x" * (dashboard.MAX_BODY + 1))[0] == 413
    assert ask(server, **{"X-Long": "x" * (dashboard.MAX_HEADERS + 1)})[0] == 431
    assert contents(made) == before


def test_the_refusal_as_a_user_sees_it(tmp_path):
    done = subprocess.run(
        [COMMAND, "dashboard", "--host", "0.0.0.0"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "CALTECH_HPO_TOKEN" in done.stderr and "openssl rand" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_is_searched_is_not_deleted(copied):
    app = app_of(copied, writable=True)
    path = f"/api/studies/{copied.study}"
    for name, said in (
        ("demo", b"search on"),
        (CONFIRM + "demo", b"confirm of"),
        (FINAL + "demo", b"final training of"),
    ):
        with study_lock(default_url(copied.home), copied.home, name, "search"):
            refused = call(app, "DELETE", path)
        assert refused.status == 409 and b"another " + said + b" study 'demo' is running" in refused.body
    assert call(app, "DELETE", path).status == 204
