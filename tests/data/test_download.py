"""Fetching: resume, checksum, safe unpacking, the offline message; the demo's digits."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from helpers import write_folders

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.download import download, fetch_caltech101, remove_leftovers, write_demo
from caltech_hpo.errors import DataError


def make_archive(path: Path, members: Path | None, extra: list[tarfile.TarInfo] = ()) -> str:
    """A zip like CaltechDATA's around a tar.gz of `members`; returns its MD5."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        if members is not None:
            tar.add(members, "101_ObjectCategories")
        for info in extra:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("caltech-101/101_ObjectCategories.tar.gz", inner.getvalue())
        outer.writestr("caltech-101/show_annotation.m", "%")
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "caltech-101.zip"
    return path, make_archive(path, write_folders(tmp_path / "source", size=(64, 64)))


@pytest.fixture
def server(archive):
    """Serves the archive with Range support; `cut` ends every answer after that many bytes."""
    content = archive[0].read_bytes()
    state = {"ranges": [], "cut": None, "status": None}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state["ranges"].append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            if state["status"] or start >= len(content):
                self.send_error(state["status"] or 416)
                return
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: state["cut"]])

        def log_message(self, *_):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{served.server_port}/caltech-101.zip"
    yield state
    served.shutdown()


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "unpack-abc" / "deep").mkdir(parents=True)
    (tmp_path / "unpack-file").write_text("stays")
    remove_leftovers(tmp_path, "unpack-")
    assert [path.name for path in tmp_path.iterdir()] == ["unpack-file"]


def test_a_download_resumes_and_is_unpacked(tmp_path, archive, server):
    home, seen = tmp_path / "datasets", []
    server["cut"] = 1000
    with pytest.raises(DataError, match=r"stopped at 1,000 of [\d,]+ bytes"):
        fetch_caltech101(home, url=server["url"], md5=archive[1])
    server["cut"] = None
    folder = fetch_caltech101(home, url=server["url"], md5=archive[1], progress=lambda *a: seen.append(a))
    assert server["ranges"] == [None, "bytes=1000-"]
    assert scan(folder).classes == ("ant", "Bee", "cat")
    assert any(label.startswith("downloading") for label, *_ in seen)
    assert sorted(path.name for path in home.iterdir()) == ["caltech101", "caltech101.lock"]
    fetch_caltech101(home, url="http://127.0.0.1:9/", md5="")  # there already: nothing is asked


def test_a_whole_partial_file_is_taken(tmp_path, archive, server):
    (tmp_path / "a.zip.part").write_bytes(archive[0].read_bytes())
    assert download(server["url"], tmp_path / "a.zip").read_bytes() == archive[0].read_bytes()


def test_a_wrong_checksum_removes_the_download(tmp_path, server):
    with pytest.raises(DataError, match=r"MD5 .* expected 0000"):
        fetch_caltech101(tmp_path / "datasets", url=server["url"], md5="0000")
    assert not (tmp_path / "datasets" / "caltech-101.zip").exists()


def test_a_server_error_and_no_network_name_the_three_ways_out(tmp_path, server):
    server["status"] = 503
    for url in (server["url"], "http://127.0.0.1:9/x.zip"):
        with pytest.raises(DataError) as raised:
            fetch_caltech101(tmp_path / "datasets", url=url)
        for way in ("data fetch' and copy", "--archive FILE", "--data DIR"):
            assert way in str(raised.value)


def test_an_archive_of_the_users_is_taken(tmp_path, archive):
    folder = fetch_caltech101(tmp_path / "datasets", archive=archive[0], md5=archive[1])
    assert len(scan(folder).training) == 9
    assert archive[0].exists()


def test_the_inner_archive_is_taken_too(tmp_path, archive):
    with zipfile.ZipFile(archive[0]) as outer:
        outer.extract("caltech-101/101_ObjectCategories.tar.gz", tmp_path)
    inner = tmp_path / "caltech-101" / "101_ObjectCategories.tar.gz"
    assert len(scan(fetch_caltech101(tmp_path / "datasets", archive=inner)).training) == 9


def test_damage_inside_the_inner_archive_is_noticed(tmp_path, archive):
    with zipfile.ZipFile(archive[0]) as outer:
        content = bytearray(outer.read("caltech-101/101_ObjectCategories.tar.gz"))
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    (tmp_path / "inner.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch_caltech101(tmp_path / "datasets", archive=tmp_path / "inner.tar.gz")
    assert not (tmp_path / "datasets" / "caltech101").exists()


@pytest.mark.parametrize("kind", ["absent", "text", "other zip", "no folder", "cut"])
def test_unusable_archives(tmp_path, archive, kind):
    path = tmp_path / f"{kind}.zip"
    if kind == "text":
        path.write_text("hello")
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as outer:
            outer.writestr("a.txt", "a")
    elif kind == "no folder":
        make_archive(path, None)
    elif kind == "cut":
        path.write_bytes(archive[0].read_bytes()[:-3000])
    md5 = hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else ""
    with pytest.raises(DataError):
        fetch_caltech101(tmp_path / "datasets", archive=path, md5=md5)
    assert not (tmp_path / "datasets" / "caltech101").exists()


@pytest.mark.parametrize("name", ["../../evil.txt", "/tmp/caltech-hpo-evil.txt", "101_ObjectCategories/link"])
def test_an_archive_cannot_leave_its_folder(tmp_path, name):
    info = tarfile.TarInfo(name)
    info.size = 1
    if name.endswith("link"):
        info.type, info.linkname, info.size = tarfile.SYMTYPE, "../../..", 0
    path = tmp_path / "evil.zip"
    md5 = make_archive(path, write_folders(tmp_path / "source"), [info])
    before = {p for p in tmp_path.rglob("*") if "datasets" not in p.parts}
    try:
        fetch_caltech101(tmp_path / "deep" / "datasets", archive=path, md5=md5)
    except DataError as error:
        assert "cannot be unpacked" in str(error)
    after = {p for p in tmp_path.rglob("*") if "datasets" not in p.parts and p.name != "deep"}
    assert after == before
    assert not Path("/tmp/caltech-hpo-evil.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_an_archive_holds_files_and_folders_alone(tmp_path, kind):
    """A link that stays below its folder may still lead what comes after it out of there."""
    info = tarfile.TarInfo("101_ObjectCategories/ant/odd.png")
    info.type, info.linkname = kind, "image_000.png"
    path = tmp_path / "odd.zip"
    md5 = make_archive(path, write_folders(tmp_path / "source"), [info])
    with pytest.raises(DataError, match=r"ant/odd\.png in it is neither a file nor a folder"):
        fetch_caltech101(tmp_path / "datasets", archive=path, md5=md5)
    assert [made.name for made in (tmp_path / "datasets").iterdir()] == ["caltech101.lock"]


def test_the_demo_is_written_once_as_image_files(tmp_path):
    index = scan(write_demo(tmp_path))
    assert len(index.classes) == 10
    assert len(index.training) + len(index.validation) + len(index.test) == 1_797
    before = (tmp_path / "demo").stat().st_mtime_ns
    write_demo(tmp_path)
    assert (tmp_path / "demo").stat().st_mtime_ns == before
