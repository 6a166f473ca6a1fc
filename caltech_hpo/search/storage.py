"""The study database: open or refuse, create or continue a study, one supervisor at a time."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caltech_hpo.errors import StorageError, UsageError
from caltech_hpo.search.changes import DATA_ATTR, SPEC_ATTR, SPEC_HASH_ATTR, check_unchanged
from caltech_hpo.spec import StudySpec
from caltech_hpo.study_files import load_study

if TYPE_CHECKING:
    import optuna

METRIC = "validation top-1 accuracy"
# Some of Optuna's: a process killed while it made them left fewer.
OPTUNAS_TABLES = {"studies", "trials", "trial_heartbeats", "trial_intermediate_values", "alembic_version"}
BUSY_TIMEOUT = 60  # seconds that SQLite waits for another writer


def default_url(home: Path) -> str:
    """The SQLite database in the home."""
    return f"sqlite:///{(home / 'studies.db').absolute()}"


def sqlite_path(url: str) -> Path | None:
    """The file behind a SQLite URL; None for another database. Raises StorageError."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        raise StorageError(
            "--storage is not a database URL",
            "write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE",
        ) from error
    if not parsed.drivername.startswith("sqlite"):
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise StorageError("--storage: a SQLite database in memory keeps nothing", "write sqlite:///FILE")
    return Path(parsed.database)


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Opens (or creates) the database. Raises StorageError for anything that is no Optuna database."""
    path = sqlite_path(url)
    there = False
    if path is not None:
        there = check_sqlite(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{path.parent}: {error.strerror}", "give a writable --home or --storage"
            ) from error
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if path is not None:
        options["connect_args"] = {"timeout": BUSY_TIMEOUT}
    fix = "check --storage (or CALTECH_HPO_STORAGE), the file's permissions, and that the server answers"
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=options, skip_table_creation=there)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StorageError(f"{shown(url)}: cannot be opened: {_first_line(error)}", fix) from error
    except RuntimeError as error:  # Optuna's word for a schema of another version
        raise StorageError(
            f"{shown(url)}: {_first_line(error)}", "back the file up, then run 'optuna storage upgrade'"
        ) from error
    except ImportError as error:
        raise StorageError(f"{shown(url)}: {error}", "pip install the database's driver") from error
    if path is not None:
        from caltech_hpo.search.sqlite import prepare_sqlite

        prepare_sqlite(storage.engine)
    return storage


def open_existing(url: str) -> optuna.storages.RDBStorage | None:
    """As `open_storage`, but None where there is no database file: reading creates nothing."""
    path = sqlite_path(url)
    return None if path is not None and not path.exists() else open_storage(url)


def study_names(storage: optuna.storages.RDBStorage | None) -> list[str]:
    """The names of the stored studies, sorted."""
    return [] if storage is None else sorted(study.study_name for study in storage.get_all_studies())


def shown(url: str) -> str:
    """The URL without its password; a SQLite file by its path."""
    from sqlalchemy.engine import make_url

    path = sqlite_path(url)
    return str(path) if path is not None else make_url(url).render_as_string(hide_password=True)


def _first_line(error: BaseException) -> str:
    return str(error.__cause__ or error).splitlines()[0]


def check_sqlite(path: Path) -> bool:
    """Whether the file has Optuna's tables; refuses one that is empty, no SQLite, or another program's.

    SQLite would silently turn an empty file into a new database, and a truncated one with it.
    """
    if not path.exists():
        return False
    if not path.is_file():
        raise StorageError(f"{path}: is not a file", "give --storage the path of a database file")
    if path.stat().st_size == 0:
        raise StorageError(
            f"{path}: is empty (0 bytes), not a database",
            "restore it from a backup, or remove it to start with no studies",
        )
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT)) as connection:
            tables = {
                row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            }
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise StorageError(f"{path}: cannot be opened: {error}", "check its permissions") from error
        raise StorageError(
            f"{path}: another program has held the database for {BUSY_TIMEOUT} seconds",
            "find what writes to it, then run the command again",
        ) from error
    except sqlite3.DatabaseError as error:
        raise StorageError(
            f"{path}: is no usable SQLite database: {error}",
            "restore it from a backup, check its permissions, or give another --storage",
        ) from error
    if tables and "studies" not in tables:
        raise StorageError(
            f"{path}: belongs to another program (it has no studies table)", "give another --storage"
        )
    return tables >= OPTUNAS_TABLES


def find_study(storage: optuna.storages.RDBStorage | None, name: str) -> optuna.Study | None:
    """The stored study, or None."""
    if storage is None:
        return None
    import optuna

    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def stored_study(url: str, name: str) -> optuna.Study:
    """The stored study. Raises UsageError: for a name that no study file has, with the nearest one."""
    study = find_study(open_existing(url), name)
    if study is None:
        load_study(name)  # an unknown name is the likelier mistake, and has its own error
        raise UsageError(
            f"study '{name}' is not in the database",
            f"run 'caltech-hpo search --study {name} --trials N' first",
        )
    return study


def open_study(
    storage: optuna.storages.RDBStorage, name: str, spec: StudySpec, data: str, *,
    sampler_seed: int, allow_changed: bool,
) -> optuna.Study:  # fmt: skip
    """Creates the study, or continues it after checking that spec and data are those it was made with.

    Raises UsageError showing what changed, unless `allow_changed`; changed choices and other data
    are refused all the same.
    """
    import optuna

    from caltech_hpo.search.pruning import make_pruner, make_sampler

    study = find_study(storage, name)
    if study is not None:
        check_unchanged(study, name, spec, data, allow_changed=allow_changed)
    so_far = 0 if study is None else len(study.get_trials(deepcopy=False))
    study = optuna.create_study(
        study_name=name, storage=storage, direction="maximize", load_if_exists=True,
        sampler=make_sampler(spec, sampler_seed, so_far), pruner=make_pruner(spec),
    )  # fmt: skip
    if study.user_attrs.get(SPEC_HASH_ATTR) != spec.hash or study.user_attrs.get(DATA_ATTR) != data:
        study.set_metric_names([METRIC])
        study.set_user_attr(SPEC_ATTR, spec.model_dump_json())
        study.set_user_attr(DATA_ATTR, data)
        study.set_user_attr(SPEC_HASH_ATTR, spec.hash)
    return study
