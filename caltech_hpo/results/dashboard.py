"""Serves optuna-dashboard on the study database, behind the guard."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from caltech_hpo.errors import UsageError
from caltech_hpo.results.guard import Access, guarded
from caltech_hpo.search.storage import open_storage

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from optuna.storages import BaseStorage

MAX_HEADERS = 64 * 1024  # bytes
MAX_BODY = 64 * 1024  # bytes; nothing that only reads has a body
MAX_UPLOAD = 32 * 1024 * 1024  # bytes; artifacts come as base64, a third longer than their file


class Address(NamedTuple):
    """A host to listen on as it was given, and what it means."""

    host: str
    family: int
    where: tuple[Any, ...]  # as `socket.bind` takes it: IP address, port, ...

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.where[1]}"


def make_app(storage_url: str, artifacts: Path, access: Access) -> WSGIApplication:
    """optuna-dashboard as a WSGI application that allows what `access` says.

    A dashboard that only reads makes no artifact folder: the home may be read-only. Raises StorageError.
    """
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    if access.writable:
        artifacts.mkdir(parents=True, exist_ok=True)
    storage = open_studies(storage_url, writable=access.writable)
    store = FileSystemArtifactStore(str(artifacts))
    return guarded(optuna_dashboard.wsgi(storage, artifact_store=store), access)


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
