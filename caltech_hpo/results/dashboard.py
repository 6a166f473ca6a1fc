"""Serves optuna-dashboard on the study database, behind the guard."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from caltech_hpo.errors import StorageError, UsageError
from caltech_hpo.results.guard import Access, guarded
from caltech_hpo.results.narrator import narrated
from caltech_hpo.search.locks import all_locks
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import open_storage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from optuna.storages import BaseStorage

MAX_HEADERS = 64 * 1024  # bytes
MAX_BODY = 64 * 1024  # bytes; nothing that only reads has a body
MAX_UPLOAD = 32 * 1024 * 1024  # bytes; artifacts come as base64, a third longer than their file


DELETED = re.compile(r"/api/studies/([0-9]+)/?")


class Address(NamedTuple):
    """A host to listen on as it was given, and what it means."""

    host: str
    family: int
    where: tuple[Any, ...]  # as `socket.bind` takes it: IP address, port, ...

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.where[1]}"


def make_app(place: Place, access: Access) -> WSGIApplication:
    """optuna-dashboard as a WSGI application that allows what `access` says, with our notes and pictures.

    A dashboard that only reads makes no artifact folder: the home may be read-only. Raises StorageError.
    """
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    artifacts = place.home / "artifacts"
    if access.writable:
        artifacts.mkdir(parents=True, exist_ok=True)
    storage = open_studies(place.storage, writable=access.writable)
    store = FileSystemArtifactStore(str(artifacts))
    app = narrated(optuna_dashboard.wsgi(storage, artifact_store=store), storage, place)
    return guarded(sparing_searched(app, storage, place), access)


def sparing_searched(app: WSGIApplication, storage: BaseStorage, place: Place) -> WSGIApplication:
    """The same, but no study is deleted while it is searched, confirmed or retrained.

    Its supervisor would lose its trials.
    """

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        found = DELETED.fullmatch(environ.get("PATH_INFO", ""))
        if environ["REQUEST_METHOD"] != "DELETE" or found is None:
            return app(environ, start_response)
        try:
            name = storage.get_study_name_from_id(int(found[1]))
            with all_locks(place.storage, place.home, name):
                return app(environ, start_response)
        except KeyError:  # optuna-dashboard says so
            return app(environ, start_response)
        except StorageError as error:
            body = json.dumps({"reason": str(error).splitlines()[0]}).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            start_response("409 Conflict", headers)
            return [body]

    return application


def open_studies(storage_url: str, *, writable: bool) -> BaseStorage:
    """The study database; if not `writable`, SQLite itself refuses what would write. Raises StorageError."""
    from optuna.storages import get_storage
    from sqlalchemy import event

    storage = open_storage(storage_url)
    if not writable and storage.engine.dialect.name == "sqlite":
        event.listen(storage.engine, "connect", _only_read)
        storage.engine.dispose()  # connections from before
    # get_storage puts Optuna's cache in front of the database: with thousands of trials a poll then
    # takes a quarter of a second instead of four.
    return get_storage(storage)


def _only_read(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA query_only = ON")


def resolve(host: str, port: int) -> Address:
    """The address that `host` means on this machine. Raises UsageError when it means none."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: no name can be that long, or have empty labels
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {host}:{port}: {reason}", "give --host a name or an address of this machine"
        ) from error
    return Address(host, family, where)


def bind(address: Address) -> socket.socket:
    """A listening socket, so that the URL can be printed once it works; port 0 takes a free one.

    Raises UsageError when the address is taken or not this machine's.
    """
    try:
        return socket.create_server(address.where, family=address.family)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {address}: {error.strerror or error}",
            "another dashboard may be running; give --port another number",
        ) from error


def serve(app: WSGIApplication, listening: socket.socket, *, writable: bool) -> None:
    """Serves until interrupted."""
    import waitress

    waitress.create_server(
        app, sockets=[listening], threads=8, ident=None, max_request_header_size=MAX_HEADERS,
        max_request_body_size=MAX_UPLOAD if writable else MAX_BODY,
    ).run()  # fmt: skip
