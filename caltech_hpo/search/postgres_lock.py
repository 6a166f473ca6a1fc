"""A lock of PostgreSQL's that is held by a connection of its own, and ends with it."""

from __future__ import annotations

import os
import socket

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from caltech_hpo.errors import StorageError
from caltech_hpo.search.locks import FIX, lock_number
from caltech_hpo.search.urls import no_driver, redact, shown

# The server asks after a silent client, so that the lock of a machine that was switched off ends within
# a minute and not after two hours; and it must not end a session because it waits.
SETTINGS = (
    "SET tcp_keepalives_idle = 30",
    "SET tcp_keepalives_interval = 10",
    "SET tcp_keepalives_count = 3",
    "SELECT set_config('idle_session_timeout', '0', false)"
    " WHERE current_setting('server_version_num')::int >= 140000",
)
HOLDER = text(
    "SELECT a.application_name, a.client_addr::text, a.backend_start::text"
    " FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
    " WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1"
    " AND l.classid::bigint = :high AND l.objid::bigint = :low"
    " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


class AdvisoryLock:
    """Held from its making to `close`, or until the connection breaks."""

    def __init__(self, url: str, name: str, what: str) -> None:
        """Raises StorageError if another session holds it, or the server does not answer."""
        self._url, self._what, self._number = url, what, lock_number(name)
        try:
            self._engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        except ImportError as error:
            raise no_driver(url, error) from error
        self._connection: Connection | None = self._take()

    def check(self) -> None:
        """Raises StorageError if the connection broke and another session took the lock meanwhile."""
        if self._connection is not None:
            try:
                self._connection.execute(text("SELECT 1"))
                return
            except DBAPIError:
                # Dropped: a broken one would connect again by itself, without the lock.
                self._connection.close()
                self._connection = None
        self._connection = self._take()

    def close(self) -> None:
        """Ends the connection, and with it the lock."""
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()

    def _take(self) -> Connection:
        try:
            connection = self._engine.connect()
            for setting in SETTINGS:
                connection.execute(text(setting))
            name = f"caltech-hpo: process {os.getpid()} on {socket.gethostname()}"[:63]
            connection.execute(text("SELECT set_config('application_name', :name, false)"), {"name": name})
            taken = connection.scalar(text("SELECT pg_try_advisory_lock(:number)"), {"number": self._number})
            holder = "" if taken else self._holder(connection)
        except DBAPIError as error:
            line = redact(str(error.orig).splitlines()[0], self._url)
            raise StorageError(
                f"{shown(self._url)}: the database does not answer: {line}",
                "check that it runs, then run the command again: it goes on from here",
            ) from error
        if not taken:
            connection.close()
            raise StorageError(f"another {self._what} is running{holder}", FIX)
        return connection

    def _holder(self, connection: Connection) -> str:
        unsigned = self._number % 2**64
        row = connection.execute(HOLDER, {"high": unsigned >> 32, "low": unsigned % 2**32}).first()
        if row is None:  # it ended while we asked
            return ""
        name, address, since = row
        return f": {name.removeprefix('caltech-hpo: ')}, {address or 'a local socket'}, since {since}"
