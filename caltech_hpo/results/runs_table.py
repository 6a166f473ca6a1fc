"""What `confirm` was asked to do and each training it has finished, in tables of the study database."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, Column, Double, Integer, MetaData, String, Table, Text, UniqueConstraint
from sqlalchemy import select as select_rows
from sqlalchemy.exc import IntegrityError

from caltech_hpo.results.ledger import create, has_table, now
from caltech_hpo.results.ranking import Candidate
from caltech_hpo.search.sqlite import writing
from caltech_hpo.spec import Frozen

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

metadata = MetaData()
confirm_runs = Table(
    "confirm_runs",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("study", String(512), nullable=False),
    Column("trial", Integer, nullable=False),
    Column("configuration", String(16), nullable=False),
    Column("recipe_hash", String(16), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("value", Double, nullable=False),
    Column("best_epoch", Integer, nullable=False),
    Column("epochs_run", Integer, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("stop_reason", Text, nullable=False),
    Column("finished_at", String(32), nullable=False),
    UniqueConstraint("study", "recipe_hash"),
)
# Kept so that `final` ranks what the latest confirm asked for, also when it was interrupted.
confirm_requests = Table(
    "confirm_requests",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("study", String(512), nullable=False),
    Column("finalists", Text, nullable=False),
    Column("seeds", Text, nullable=False),
    Column("asked_at", String(32), nullable=False),
)


class ConfirmRun(Frozen):
    """One finished training of a finalist.

    `value` is its best validation top-1 accuracy, 0 to 1, at `best_epoch`; `stop_reason` is "finished",
    or says how it diverged. `finished_at` is UTC in ISO format.
    """

    study: str
    trial: int
    configuration: str
    recipe_hash: str
    seed: int
    value: float
    best_epoch: int
    epochs_run: int
    seconds: float
    stop_reason: str
    finished_at: str


class ConfirmRequest(Frozen):
    """What one `confirm` was asked for."""

    finalists: tuple[Candidate, ...]
    seeds: tuple[int, ...]


def runs(storage: RDBStorage, study: str) -> list[ConfirmRun]:
    """The finished trainings of a study, oldest first; creates nothing."""
    with storage.engine.connect() as connection:
        if not has_table(connection, confirm_runs):
            return []
        columns = [column for column in confirm_runs.c if column.name != "id"]
        query = select_rows(*columns).where(confirm_runs.c.study == study).order_by(confirm_runs.c.id)
        return [ConfirmRun.model_validate(dict(row._mapping)) for row in connection.execute(query)]


def requests(storage: RDBStorage, study: str) -> list[ConfirmRequest]:
    """What was asked for, the latest first; creates nothing."""
    with storage.engine.connect() as connection:
        if not has_table(connection, confirm_requests):
            return []
        query = select_rows(confirm_requests.c.finalists, confirm_requests.c.seeds)
        query = query.where(confirm_requests.c.study == study).order_by(confirm_requests.c.id.desc())
        return [
            ConfirmRequest.model_validate({"finalists": json.loads(finalists), "seeds": json.loads(seeds)})
            for finalists, seeds in connection.execute(query)
        ]


def add_run(storage: RDBStorage, run: ConfirmRun) -> None:
    """Keeps a finished training; of the same recipe the first one stays."""
    create(storage.engine, confirm_runs)
    with contextlib.suppress(IntegrityError), writing(storage.engine).begin() as connection:
        connection.execute(confirm_runs.insert().values(run.model_dump()))


def add_request(
    storage: RDBStorage, study: str, finalists: Sequence[Candidate], seeds: Sequence[int]
) -> None:
    """Keeps what was asked for, unless it is what was asked for last."""
    request = ConfirmRequest(finalists=tuple(finalists), seeds=tuple(seeds))
    if requests(storage, study)[:1] == [request]:
        return
    create(storage.engine, confirm_requests)
    values = request.model_dump(mode="json")
    with writing(storage.engine).begin() as connection:
        connection.execute(
            confirm_requests.insert().values(
                study=study, finalists=json.dumps(values["finalists"]), seeds=json.dumps(values["seeds"]),
                asked_at=now(),
            )
        )  # fmt: skip
