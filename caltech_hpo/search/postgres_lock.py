"""A lock of PostgreSQL's that is held by a connection of its own, and ends with it."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterable, Iterator

from sqlalchemy import BigInteger, Column, Connection, MetaData, String, Table, create_engine, select, text
from sqlalchemy.dialects.postgresql import insert
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
# Who had each lock last. A holder whose connection broke reads here whether anybody else had it meanwhile.
HOLDERS = Table(
    "caltech_hpo_locks", MetaData(),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("holder", String(32), nullable=False),
)  # fmt: skip
CREATION = lock_number("creation of caltech_hpo_locks")


class AdvisoryLock:
    """Held from its making to `close`, or until the connection breaks."""

    def __init__(self, url: str, name: str, what: str) -> None:
        """Raises StorageError if another session holds it, or the server does not answer."""
        self._url, self._what, self._number = url, what, lock_number(name)
        try:
            self._engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        except ImportError as error:
            raise no_driver(url, error) from error
        self._token = uuid.uuid4().hex
        self._connection: Connection | None = self._take()
        try:
            with self._speaking():
                self._sign(self._connection)
        except StorageError:
            self.close()
            raise

    def check(self) -> None:
        """Takes the lock again if the connection broke.

        Raises StorageError if another session has it, or had it meanwhile: what it wrote is not known here.
        """
        if self._connection is not None:
            try:
                self._connection.execute(text("SELECT 1"))
                return
            except DBAPIError:
                # Dropped: a broken one would connect again by itself, without the lock.
                self._connection.close()
                self._connection = None
        self._connection = self._take()
        with self._speaking():
            signed = self._connection.scalar(select(HOLDERS.c.holder).where(HOLDERS.c.number == self._number))
        if signed != self._token:
            raise StorageError(
                f"the connection to the database broke, and another {self._what} ran meanwhile",
                "run the command again: it goes on from here",
            )

    def _sign(self, connection: Connection) -> None:
        # Two sessions that create one table at once would both fail.
        connection.execute(text("SELECT pg_advisory_lock(:number)"), {"number": CREATION})
        HOLDERS.create(connection, checkfirst=True)
        connection.execute(text("SELECT pg_advisory_unlock(:number)"), {"number": CREATION})
        row = insert(HOLDERS).values(number=self._number, holder=self._token)
        connection.execute(row.on_conflict_do_update(index_elements=["number"], set_={"holder": self._token}))

    def close(self) -> None:
        """Ends the connection, and with it the lock."""
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()

    def _take(self) -> Connection:
        with self._speaking():
            connection = self._engine.connect()
            for setting in SETTINGS:
                connection.execute(text(setting))
            name = f"caltech-hpo: process {os.getpid()} on {socket.gethostname()}"[:63]
            connection.execute(text("SELECT set_config('application_name', :name, false)"), {"name": name})
            taken = connection.scalar(text("SELECT pg_try_advisory_lock(:number)"), {"number": self._number})
            holder = None if taken else _holder(connection, self._number)
        if not taken:
            connection.close()
            who = f": {holder}" if holder else ""  # none: it ended while we asked
            raise StorageError(f"another {self._what} is running{who}", FIX)
        return connection

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            line = redact(str(error.orig).splitlines()[0], self._url)
            raise StorageError(
                f"{shown(self._url)}: the database does not answer: {line}",
                "check that it runs, then run the command again: it goes on from here",
            ) from error


def holders_there(url: str, names: Iterable[str]) -> dict[str, str]:
    """As `holders_of`, on the server. Raises SQLAlchemyError where it does not answer."""
    with create_engine(url, poolclass=NullPool).connect() as connection:
        found = {name: _holder(connection, lock_number(name)) for name in names}
    return {name: holder for name, holder in found.items() if holder is not None}


def _holder(connection: Connection, number: int) -> str | None:
    unsigned = number % 2**64
    row = connection.execute(HOLDER, {"high": unsigned >> 32, "low": unsigned % 2**32}).first()
    if row is None:
        return None
    name, address, since = row
    return f"{name.removeprefix('caltech-hpo: ')}, {address or 'a local socket'}, since {since}"
