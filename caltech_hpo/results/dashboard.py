"""Serves optuna-dashboard on the study database."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from caltech_hpo.errors import UsageError
from caltech_hpo.search.storage import open_storage


def make_app(storage_url: str, artifacts: Path) -> Any:
    """optuna-dashboard as a WSGI application. Raises StorageError."""
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore
    from optuna.storages import get_storage

    artifacts.mkdir(parents=True, exist_ok=True)
    # get_storage puts Optuna's cache in front of the database: with thousands of trials a poll then
    # takes a quarter of a second instead of four.
    storage = get_storage(open_storage(storage_url))
    return optuna_dashboard.wsgi(storage, artifact_store=FileSystemArtifactStore(str(artifacts)))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that the URL can be printed once it works; port 0 takes a free one.

    Raises UsageError when the address is taken or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            "another dashboard may be running; give --port another number",
        ) from error


def serve(app: Any, listening: socket.socket) -> None:
    """Serves until interrupted."""
    import waitress

    waitress.create_server(app, sockets=[listening], threads=8, ident=None).run()
