"""The searches that `serve` shall run: a table of the study database."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Column, Engine, Integer, MetaData, Row, String, Table, Text, select, update

from caltech_hpo.errors import UsageError
from caltech_hpo.results.ledger import create, has_table, now
from caltech_hpo.search.sqlite import writing
from caltech_hpo.search.storage import open_existing, open_storage
from caltech_hpo.spec import Frozen

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

JobState = Literal["waiting", "running", "done", "failed", "cancelled"]
# "cancel" is what was asked for of a running one, until `serve` has ended it.
metadata = MetaData()
work_queue = Table(
    "work_queue",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("study", String(512), nullable=False),
    Column("trials", Integer, nullable=False),
    Column("options", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("cancel", Integer, nullable=False),
    Column("message", Text, nullable=False),
    Column("submitted_by", String(256), nullable=False),
    Column("submitted_at", String(32), nullable=False),
    Column("began_at", String(32), nullable=False),
    Column("ended_at", String(32), nullable=False),
)


class Options(Frozen):
    """Options of `search` that whoever submits may choose; the others are serve's.

    `data` is a folder and `weights` may be a file on serve's machine; `enqueue` as --enqueue takes it.
    """

    data: str | None = None
    weights: str | None = None
    seed: int | None = None
    enqueue: tuple[str, ...] = ()
    baselines: bool = True
    skip_unreadable: bool = False

    def arguments(self) -> list[str]:
        """As `search` takes them; no value can be read as another option."""
        given = {"--data": self.data, "--weights": self.weights, "--seed": self.seed}
        made = [f"{name}={value}" for name, value in given.items() if value is not None]
        made += [f"--enqueue={text}" for text in self.enqueue]
        flags = {"--no-baselines": not self.baselines, "--skip-unreadable": self.skip_unreadable}
        return made + [flag for flag, wanted in flags.items() if wanted]


class Submission(Frozen):
    """A search that was asked for: the study shall have `trials` finished ones.

    `cancel` says that it shall end; `message` says why it failed or waits. Times are UTC in ISO format,
    "" before they come.
    """

    id: int
    study: str
    trials: int
    options: Options
    state: JobState
    cancel: bool
    message: str
    submitted_by: str
    submitted_at: str
    began_at: str
    ended_at: str

    @property
    def ended(self) -> bool:
        """Whether it will not run any more."""
        return self.state in ("done", "failed", "cancelled")


def submit(url: str, study: str, trials: int, options: Options | None = None) -> Submission:
    """Puts a search at the end of the queue."""
    storage = open_storage(url)
    create(storage.engine, work_queue)
    values: dict[str, Any] = {
        "study": study, "trials": trials, "options": (options or Options()).model_dump_json(),
        "state": "waiting", "cancel": 0, "message": "", "submitted_by": _somebody(), "submitted_at": now(),
        "began_at": "", "ended_at": "",
    }  # fmt: skip
    with writing(storage.engine).begin() as connection:
        key = connection.execute(work_queue.insert().values(values)).inserted_primary_key
    assert key is not None, "id is generated"
    return submission(storage, key[0])


def _somebody() -> str:
    """Who submits."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


def submissions(url: str) -> list[Submission]:
    """All of them, in the order in which they run; creates nothing."""
    storage = open_existing(url)
    if storage is None:
        return []
    with storage.engine.connect() as connection:
        if not has_table(connection, work_queue):
            return []
        rows = connection.execute(select(work_queue).order_by(work_queue.c.id))
        return [_submission(row) for row in rows]


def submission(storage: RDBStorage, number: int) -> Submission:
    """One of them. Raises UsageError for an unknown number."""
    with storage.engine.connect() as connection:
        row = None
        if has_table(connection, work_queue):
            row = connection.execute(select(work_queue).where(work_queue.c.id == number)).first()
    if row is None:
        raise UsageError(f"there is no submission {number}", "'caltech-hpo status' lists them")
    return _submission(row)


def cancel(url: str, number: int) -> Submission:
    """Takes one out of the queue; one that runs is ended by `serve`, its trials stay. Raises UsageError."""
    storage = open_existing(url)
    if storage is None:
        raise UsageError(f"there is no submission {number}", "'caltech-hpo status' lists them")
    found = submission(storage, number)
    if found.ended:
        raise UsageError(f"submission {number} is {found.state}", "there is nothing to cancel")
    waiting = update(work_queue).where(work_queue.c.id == number, work_queue.c.state == "waiting")
    running = update(work_queue).where(work_queue.c.id == number, work_queue.c.state == "running")
    with writing(storage.engine).begin() as connection:
        connection.execute(running.values(cancel=1))
        connection.execute(waiting.values(cancel=1, state="cancelled", ended_at=now()))
    return submission(storage, number)


def next_submission(storage: RDBStorage, besides: Collection[int] = ()) -> Submission | None:
    """The one to run now: what a `serve` that is gone left running, then the oldest that waits.

    Those `besides`, whose study somebody else searches, are passed over.
    """
    with storage.engine.connect() as connection:
        if not has_table(connection, work_queue):
            return None
        query = select(work_queue).where(work_queue.c.state.in_(("running", "waiting")))
        query = query.where(work_queue.c.id.not_in(besides))
        row = connection.execute(query.order_by(work_queue.c.state, work_queue.c.id)).first()
    return None if row is None else _submission(row)


def change(engine: Engine, number: int, **values: Any) -> None:
    """Writes columns of one."""
    with writing(engine).begin() as connection:
        connection.execute(update(work_queue).where(work_queue.c.id == number).values(**values))


def _submission(row: Row[Any]) -> Submission:
    values = dict(row._mapping)
    return Submission.model_validate(
        {**values, "options": json.loads(values["options"]), "cancel": bool(values["cancel"])}
    )
