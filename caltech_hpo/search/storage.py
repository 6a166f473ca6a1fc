"""The study database: open or refuse, create or continue a study, one supervisor at a time."""

from __future__ import annotations

import logging
import sqlite3
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caltech_hpo.errors import StorageError, UsageError
from caltech_hpo.search.changes import DATA_ATTR, SPEC_ATTR, SPEC_HASH_ATTR, check_unchanged
from caltech_hpo.search.sqlite_file import needs_rollback, reading
from caltech_hpo.search.urls import no_driver, redact, shown, sqlite_path
from caltech_hpo.spec import StudySpec
from caltech_hpo.study_files import load_study

if TYPE_CHECKING:
    import optuna

METRIC = "validation top-1 accuracy"
# Some of Optuna's: a process killed while it made them left fewer.
OPTUNAS_TABLES = {"studies", "trials", "trial_heartbeats", "trial_intermediate_values", "alembic_version"}
RIGHT_SCHEMAS: set[str] = set()  # that the installed Optuna has found right in this process
BUSY_TIMEOUT = 60  # seconds that SQLite waits for another writer


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Opens (or creates) the database. Raises StorageError for anything that is no Optuna database."""
    path = sqlite_path(url)
    if path is None:
        return _connect(url, create=True)
    if not check_sqlite(path):
        _create_sqlite(url, path)
    from caltech_hpo.search.sqlite import prepare_sqlite

    storage = _connect(url, create=False)
    prepare_sqlite(storage.engine)
    return storage


def _create_sqlite(url: str, path: Path) -> None:
    """Makes the file and its tables; one process at a time, or they would trip over each other's tables."""
    from filelock import FileLock

    folder = path.parent / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{path.name}.create", timeout=BUSY_TIMEOUT):
            if not check_sqlite(path):
                _make_tables(url, path)
    except OSError as error:  # a time-out is one, too
        raise StorageError(
            f"{path.parent}: {error.strerror or error}", "give a writable --home or --storage"
        ) from error


def _make_tables(url: str, path: Path) -> None:
    """A new file takes its name once it is whole: SQLite makes an empty one first, and one that is empty or
    has a few tables because its maker was killed looks like a damaged one."""
    from caltech_hpo.data.cache import sync_folder

    if path.exists():
        _connect(url, create=True).engine.dispose()
        return
    new = path.with_name(f".{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    _connect(f"sqlite:///{new.absolute()}", create=True).engine.dispose()
    new.replace(path)
    sync_folder(path.parent)


def _connect(url: str, *, create: bool, any_schema: bool = False) -> optuna.storages.RDBStorage:
    """Raises StorageError for what cannot be opened, and for tables of another schema unless `any_schema`."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    from caltech_hpo.search.rdb import StudyStorage

    optuna.logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if sqlite_path(url) is not None:
        options["connect_args"] = {"timeout": BUSY_TIMEOUT}
    fix = "check --storage (or CALTECH_HPO_STORAGE), the file's permissions, and that the server answers"
    try:
        storage = StudyStorage(
            url, engine_kwargs=options, skip_table_creation=not create, skip_compatibility_check=True
        )
        schema = storage.get_current_version()
        # Optuna reads all its migrations to say which is the newest: a tenth of a second each time.
        if not any_schema and schema not in RIGHT_SCHEMAS:
            storage._version_manager.check_table_schema_compatibility()
            RIGHT_SCHEMAS.add(schema)
        return storage
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StorageError(f"{shown(url)}: cannot be opened: {_first_line(error, url)}", fix) from error
    except RuntimeError as error:  # Optuna's word for a schema of another version
        older = "storage upgrade" in str(error)
        raise StorageError(
            f"{shown(url)}: was made by {'an older' if older else 'a newer'} version of Optuna",
            "run 'caltech-hpo storage upgrade', which makes a backup first"
            if older
            else "pip install --upgrade optuna",
        ) from error
    except ImportError as error:
        raise no_driver(url, error) from error


def open_any_schema(url: str) -> optuna.storages.RDBStorage:
    """An existing database, whatever version of Optuna made its tables. Raises StorageError."""
    path = sqlite_path(url)
    if path is not None and not check_sqlite(path):
        raise StorageError(f"{path}: holds no studies", "check --home and --storage")
    return _connect(url, create=False, any_schema=True)


def has_database(url: str) -> bool:
    """Whether a SQLite file is there; of a server only opening tells."""
    path = sqlite_path(url)
    return path is None or path.exists()


def open_existing(url: str) -> optuna.storages.RDBStorage | None:
    """As `open_storage`, but None where there is no database file: reading creates nothing."""
    return open_storage(url) if has_database(url) else None


def study_names(storage: optuna.storages.RDBStorage | None) -> list[str]:
    """The names of the stored studies, sorted."""
    return [] if storage is None else sorted(study.study_name for study in storage.get_all_studies())


def _first_line(error: BaseException, url: str) -> str:
    lines = str(error.__cause__ or error).splitlines()
    return redact(lines[0], url) if lines else type(error).__name__


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
        with reading(path, BUSY_TIMEOUT) as connection:
            tables = {
                row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            }
            # Optuna's last step: a database that has it is whole, though an older one has fewer tables.
            rows = connection.execute("SELECT 1 FROM version_info") if "version_info" in tables else []
            versioned = bool(list(rows))
    except sqlite3.OperationalError as error:
        if needs_rollback(error):
            raise StorageError(
                f"{path}: a process was killed while it wrote, and what it left cannot be undone by reading",
                "run any command once where file and folder can be written",
            ) from error
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
    return tables >= OPTUNAS_TABLES or versioned


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
    so_far = 0 if study is None else storage.get_n_trials(study._study_id)
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
