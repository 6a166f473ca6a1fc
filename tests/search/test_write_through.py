"""The study in memory and in the database are the same study."""

from __future__ import annotations

import math
import sqlite3

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import OperationalError

from caltech_hpo.errors import StorageError, StorageFullError
from caltech_hpo.search.sqlite import prepare_sqlite, writing
from caltech_hpo.search.storage import open_storage
from caltech_hpo.search.urls import default_url
from caltech_hpo.search.write_through import hold

FLOATS = {"x": optuna.distributions.FloatDistribution(0, 1)}


@pytest.fixture
def database(tmp_path) -> RDBStorage:
    return open_storage(default_url(tmp_path))


@pytest.fixture
def study(database) -> optuna.Study:
    optuna.create_study(study_name="other", storage=database).add_trial(create_trial(value=1.0))
    study = optuna.create_study(study_name="s", storage=database, direction="maximize")
    study.set_user_attr("kept", [1])
    study.enqueue_trial({"x": 0.25}, user_attrs={"why": "before"})
    study.add_trial(create_trial(value=0.5, params={"x": 0.5}, distributions=FLOATS))
    return study


def trials(study):
    """All that Optuna knows of them; its own ids aside."""
    return [
        (
            t.number, t.state, t.values, t.params, t.distributions, t.user_attrs, t.system_attrs,
            {step: str(value) for step, value in t.intermediate_values.items()}, t.datetime_start,
            t.datetime_complete,
        )
        for t in study.get_trials()
    ]  # fmt: skip


def everything(study):
    return trials(study), study.user_attrs, study.system_attrs if hasattr(study, "system_attrs") else None


def work(held):
    """What a supervisor does, and more."""
    first = held.ask()
    assert first.user_attrs == {"why": "before"} and first.suggest_float("x", 0, 1) == 0.25
    first.suggest_categorical("c", ["a", None, 1.5, True])
    first.suggest_int("i", 1, 9, log=True)
    for step, value in enumerate([0.1, math.nan, math.inf, -math.inf]):
        first.report(value, step)
    first.set_user_attr("text", "a")
    first.set_user_attr("text", "b")
    held.tell(first, 0.75)
    held.enqueue_trial({"x": 0.125}, user_attrs={"why": "after"})
    lagging = held.ask()
    lagging.suggest_float("x", 0, 1)
    lagging.report(0.25, 1)
    held.tell(lagging, state=TrialState.PRUNED)
    held.tell(held.ask(), state=TrialState.FAIL)
    held.ask().set_user_attr("running", {"deep": [1, 2]})
    held.set_user_attr("kept", [2])
    held.set_user_attr("new", "x")


def test_what_is_read_is_what_the_database_holds(study, database):
    held, storage = hold(study, database)
    assert everything(held) == everything(study)
    assert (held.sampler, held.pruner) == (study.sampler, study.pruner)
    assert storage.age == 0
    storage.flush()  # nothing to write


@pytest.mark.parametrize("often", [False, True], ids=["one transaction", "one a change"])
def test_the_database_gets_everything(study, database, often, monkeypatch):
    held, storage = hold(study, database)
    if often:
        touched = storage._touched
        monkeypatch.setattr(storage, "_touched", lambda: (touched(), storage.flush()))
    work(held)
    assert (storage.age == 0) == often
    storage.flush()
    fresh = optuna.load_study(study_name="s", storage=RDBStorage(str(database.url)))
    assert everything(fresh) == everything(held) == everything(hold(fresh, database)[0])
    assert [trial.state.name for trial in fresh.trials] == [
        "COMPLETE", "COMPLETE", "PRUNED", "FAIL", "RUNNING",
    ]  # fmt: skip
    assert len(optuna.load_study(study_name="other", storage=database).trials) == 1


def test_a_write_that_fails_is_kept_and_tried_again(study, database, tmp_path, monkeypatch):
    held, storage = hold(study, database)
    work(held)
    before = trials(study)
    with sqlite3.connect(tmp_path / "studies.db") as blocker:
        blocker.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(storage, "_engine", impatient(database))
        with pytest.raises(StorageError, match="another program has held the database"):
            storage.flush()
        blocker.rollback()
    assert trials(study) == before and storage.age > 0
    storage.flush()
    assert trials(study) == trials(held)


def impatient(database):
    engine = sqlalchemy.create_engine(str(database.url), connect_args={"timeout": 0})
    prepare_sqlite(engine)
    return engine


def test_a_full_disk_is_said_and_nothing_is_lost(study, database):
    held, storage = hold(study, database)
    work(held)
    before = trials(study)
    with database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    full = impatient(database)
    sqlalchemy.event.listen(
        full, "connect", lambda connection, _: connection.execute(f"PRAGMA max_page_count={pages}")
    )
    ours, storage._engine = storage._engine, full
    held.ask().set_user_attr("large", "x" * 100_000)
    with pytest.raises(StorageFullError, match="no room"):
        storage.flush()
    assert trials(study) == before
    storage._engine = ours
    storage.flush()
    assert trials(study) == trials(held)


def test_writers_wait_for_each_other_from_their_beginning(database):
    """What a writer has read cannot change before it writes."""
    seen = []
    with writing(database.engine).begin() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM trials")
        with pytest.raises(OperationalError, match="locked"), writing(impatient(database)).begin():
            seen.append("began")
        with impatient(database).begin() as reader:  # readers do not
            reader.exec_driver_sql("SELECT count(*) FROM trials")
    assert not seen


def test_trials_that_another_program_adds_are_noticed(study, database):
    held, storage = hold(study, database)
    study.add_trial(create_trial(value=0.1))
    held.ask()  # the queued one
    storage.flush()
    held.ask()
    with pytest.raises(StorageError, match="another program has added trials"):
        storage.flush()
    assert len(study.trials) == 3


def test_what_others_write_beside_the_trials_stays(study, database):
    held, storage = hold(study, database)
    trial = held.ask()
    storage.flush()
    database.set_study_system_attr(study._study_id, "dashboard:note", "by hand")
    database.set_trial_user_attr(study.trials[0]._trial_id, "mark", "by hand")
    trial.set_user_attr("mine", 1)
    held.tell(trial, 0.5)
    storage.flush()
    again = optuna.load_study(study_name="s", storage=database)
    assert again.trials[0].user_attrs == {"why": "before", "mark": "by hand", "mine": 1}
    assert database.get_study_system_attrs(study._study_id)["dashboard:note"] == "by hand"


def test_the_sampler_proposes_what_it_would_on_the_database(tmp_path):
    def proposals(home, held):
        study = optuna.create_study(
            study_name="s",
            storage=open_storage(default_url(home)),
            sampler=optuna.samplers.TPESampler(seed=3),
        )
        if held:
            study, _ = hold(study, open_storage(default_url(home)))
        study.optimize(lambda t: t.suggest_float("x", 0, 1) + t.suggest_int("n", 1, 5), n_trials=15)
        return [trial.params for trial in study.trials]

    first, second = tmp_path / "a", tmp_path / "b"
    assert proposals(first, False) == proposals(second, True)
