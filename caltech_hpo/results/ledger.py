"""Every test score ever taken, in a table of the study database.

Reading creates nothing and writes nothing: a database without the table has no scores, but for those
that versions before the ledger kept in the study's attributes. The first new score brings them along.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Engine,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    select,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from caltech_hpo.data.dataset import Sample
from caltech_hpo.search.sqlite import writing
from caltech_hpo.search.storage import open_existing, open_storage
from caltech_hpo.spec import Frozen
from caltech_hpo.study_files import base_name
from caltech_hpo.terms import FitOn

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

    from caltech_hpo.search.records import TrialRecord

FINAL_ATTR = "final:"  # study attributes in which scores were kept before the ledger
BEFORE = "before the ledger"

metadata = MetaData()
final_scores = Table(
    "final_scores",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("study", String(512), nullable=False),
    Column("trial", Integer, nullable=False),
    Column("recipe_hash", String(16), nullable=False),
    Column("configuration", String(16), nullable=False),
    Column("seed", BigInteger),
    Column("fit_on", String(16), nullable=False),
    Column("model_file", Text, nullable=False),
    Column("test_list", String(64), nullable=False),
    Column("test_images", Integer, nullable=False),
    Column("top1", Double, nullable=False),
    Column("mean_per_class", Double, nullable=False),
    Column("taken_at", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("version", String(32), nullable=False),
    Column("result", Text, nullable=False),
    UniqueConstraint("study", "recipe_hash", "test_list"),
)


class FinalResult(Frozen):
    """A test score and what it belongs to. Accuracies are 0 to 1.

    `val_accuracy` is None when the validation images were trained on; `ci95` is Wilson's interval
    of `test_accuracy` over `test_images`; `test_accuracy_flip` scores each image together with its
    mirror image, where the recipe asks for it; `seeds` says how many trainings it rests on. `seed` is
    the recipe's, None in results of versions that did not note it. `leaks` counts test images whose pixels
    were in training or validation too.
    """

    study: str
    trial: int
    params: dict[str, Any]
    best_epoch: int
    val_accuracy: float | None
    test_accuracy: float
    test_mean_per_class_accuracy: float
    test_accuracy_flip: float | None = None
    test_images: int
    ci95: tuple[float, float]
    fit_on: FitOn
    model: str
    recipe_hash: str
    seeds: int = 1
    seed: int | None = None
    leaks: int = 0


class ScoreRow(Frozen):
    """One use of the test set.

    `configuration` is the recipe's hash with its seed set aside; where an old score's recipe is not
    known any more, its recipe hash stands in. `test_list` is `list_hash` of the images scored, ""
    before the ledger; `taken_at` is UTC in ISO format, or "before the ledger"; `reason` is what
    --again said. `id` is None until the row is in the table.
    """

    id: int | None = None
    study: str
    trial: int
    recipe_hash: str
    configuration: str
    seed: int | None
    fit_on: FitOn
    model_file: str
    test_list: str
    test_images: int
    top1: float
    mean_per_class: float
    taken_at: str
    reason: str = ""
    version: str
    result: FinalResult


def now() -> str:
    """The time in UTC, ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def list_hash(samples: Iterable[Sample]) -> str:
    """The SHA-256 of a text with a line "class/file<TAB>label" for each image: 64 hexadecimal digits."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(f"{sample.path}\t{sample.label}\n".encode())
    return total.hexdigest()


def scores(url: str, study: str | None = None) -> list[ScoreRow]:
    """Every test score of a study, or of all studies (None), in the order in which they were taken.

    Raises StorageError for a file that is no study database.
    """
    storage = open_existing(url)
    return [] if storage is None else _read(storage, study)


def family_scores(url: str, study: str) -> list[ScoreRow]:
    """As `scores`, of all studies with the same base name: NAME@2 repeats NAME, on the same test images."""
    return [row for row in scores(url) if base_name(row.study) == base_name(study)]


def record(url: str, row: ScoreRow) -> ScoreRow:
    """Puts a score into the table and returns it as it is kept there.

    A score of the same recipe on the same images that is there already stays as it is, and is
    returned in place of the new one.
    """
    storage = open_storage(url)
    create(storage.engine, final_scores)
    old = [earlier for earlier in _read(storage, row.study) if earlier.id is None]
    for new in (*old, row):
        # One is enough: another call may be bringing the same old scores along.
        with contextlib.suppress(IntegrityError), writing(storage.engine).begin() as connection:
            connection.execute(final_scores.insert().values(_columns(new)))
    return next(
        kept for kept in _read(storage, row.study)
        if (kept.recipe_hash, kept.test_list) == (row.recipe_hash, row.test_list)
    )  # fmt: skip


def _read(storage: RDBStorage, study: str | None) -> list[ScoreRow]:
    query = select(final_scores).order_by(final_scores.c.id)
    if study is not None:
        query = query.where(final_scores.c.study == study)
    with storage.engine.connect() as connection:
        kept = [_row(row) for row in connection.execute(query)] if has_table(connection, final_scores) else []
    return [*_not_yet_kept(storage, study, kept), *kept]


def create(engine: Engine, *tables: Table) -> None:
    """Makes the tables unless they are there."""
    for table in tables:
        try:
            with writing(engine).begin() as connection:
                connection.execute(CreateTable(table, if_not_exists=True))
        except IntegrityError:  # PostgreSQL's word when two calls make it at once
            with engine.connect() as connection:
                if not has_table(connection, table):
                    raise


def has_table(connection: Connection, table: Table) -> bool:
    """Whether the database has the table; older databases do not."""
    return inspect(connection).has_table(table.name)


def _columns(row: ScoreRow) -> dict[str, Any]:
    return {**row.model_dump(mode="json", exclude={"id", "result"}), "result": row.result.model_dump_json()}


def _row(row: Row[Any]) -> ScoreRow:
    values = dict(row._mapping)
    return ScoreRow.model_validate({**values, "result": json.loads(values["result"])})


def _not_yet_kept(storage: RDBStorage, study: str | None, kept: list[ScoreRow]) -> list[ScoreRow]:
    """The scores in study attributes, of versions before the ledger, that the table lacks."""
    known = {(row.study, row.recipe_hash) for row in kept}
    found = []
    for stored in storage.get_all_studies():
        name = stored.study_name
        if study not in (None, name):
            continue
        old = [
            FinalResult.model_validate(value)
            for key, value in stored.user_attrs.items()
            if key.startswith(FINAL_ATTR) and (name, key.removeprefix(FINAL_ATTR)) not in known
        ]
        if old:
            from caltech_hpo.search.records import trial_record

            trials = storage.get_all_trials(stored._study_id, deepcopy=False)
            records = {trial.number: trial_record(trial) for trial in trials}
            found += [old_row(name, result, records.get(result.trial)) for result in old]
    return found


def old_row(study: str, result: FinalResult, record: TrialRecord | None) -> ScoreRow:
    """The row of a score from before the ledger. `record` is its trial, which tells the configuration."""
    recipe = record.recipe if record else None
    if record and recipe and result.fit_on == "train+val":
        recipe = recipe.model_copy(update={"fit_on": result.fit_on, "epochs": record.best_epoch})
    known = recipe is not None and recipe.hash == result.recipe_hash
    return ScoreRow(
        study=study, trial=result.trial, recipe_hash=result.recipe_hash,
        configuration=recipe.configuration if recipe is not None and known else result.recipe_hash,
        seed=recipe.seed if recipe is not None and known else None,
        fit_on=result.fit_on, model_file=result.model, test_list="", test_images=result.test_images,
        top1=result.test_accuracy, mean_per_class=result.test_mean_per_class_accuracy,
        taken_at=BEFORE, version="", result=result,
    )  # fmt: skip
