"""The study as its supervisor holds it: in memory, written to the database in few transactions.

Optuna's RDBStorage commits after every value and reads unfinished trials anew for every question. The
supervisor is the study's only writer, so it can answer from memory, and decide itself when to commit.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Container, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.storages._rdb import models  # Optuna's schema; it has no public name
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Table, func, insert, select, update
from sqlalchemy.exc import OperationalError

from caltech_hpo.errors import StorageError, StorageFullError
from caltech_hpo.search import tables
from caltech_hpo.search.locks import Check, no_check
from caltech_hpo.search.records import EPOCH_KEY
from caltech_hpo.search.sqlite import is_busy, is_full, writing
from caltech_hpo.search.urls import shown

ATTEMPTS = 3  # each as long as the database's time-out, a minute


class WriteThroughStorage(InMemoryStorage):
    """One study of a database, in memory. `flush` writes what has changed, in one transaction.

    Nothing else may write trials of the study meanwhile: its lock must be held. What others write beside
    them, notes of the dashboard say, is left alone. Raises StorageError from `flush` if trials were added.
    """

    def __init__(self, database: RDBStorage, study_name: str, check_lock: Check = no_check) -> None:
        """Reads the study. `check_lock` is called before each write; it raises if the lock was lost."""
        super().__init__()
        self._check_lock = check_lock
        self._engine = database.engine
        self._name = shown(str(database.url))
        self._database_study: int = database.get_study_id_from_name(study_name)
        self._stored_ids: list[int] = []  # of the trials in the database, by number
        self._stored: set[tuple[Table, int | None, Any]] = set()
        self._changes: dict[tuple[Table, int | None, Any], dict[str, Any]] = {}
        self._states: dict[int, None] = {}  # trials whose row changed, in order
        self._since: float | None = None
        self._complete: list[FrozenTrial] | None = None
        self._reading = True
        study = self.create_new_study(database.get_study_directions(self._database_study), study_name)
        for key, value in database.get_study_user_attrs(self._database_study).items():
            self.set_study_user_attr(study, key, value)
        for key, value in database.get_study_system_attrs(self._database_study).items():
            self.set_study_system_attr(study, key, value)
        for trial in database.get_all_trials(self._database_study, deepcopy=False):
            self.create_new_trial(study, trial)
            self._stored_ids.append(trial._trial_id)
        self._reading = False

    def forget_epochs(self) -> None:
        """Drops the epochs of finished trials from memory; they stay in the database.

        For every proposal, Optuna's TPE looks through all system attributes of all trials: with 30 epochs
        each in them, that took a fifth of what a trial cost at 1,000 trials.
        """
        for trial in self.get_all_trials(0, deepcopy=False):
            if trial.state.is_finished():
                self._forget_epochs(trial)

    def _forget_epochs(self, trial: FrozenTrial) -> None:
        kept = {key: value for key, value in trial.system_attrs.items() if not key.startswith(EPOCH_KEY)}
        trial._system_attrs = kept

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Optuna's; the complete ones, which pruners ask for after every epoch, are looked for once."""
        if deepcopy or states != (TrialState.COMPLETE,):
            return super().get_all_trials(study_id, deepcopy, states)
        if self._complete is None:
            self._complete = super().get_all_trials(study_id, False, states)
        return list(self._complete)

    @property
    def age(self) -> float:
        """Seconds since the oldest change that is not in the database yet; 0 without one."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def flush(self) -> None:
        """Writes all changes in one transaction; if it fails they are kept, to be tried again.

        Raises StorageFullError where there is no room, StorageError where another program holds the file.
        """
        if self._since is None:
            return
        self._check_lock()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._write()
                return
            except OperationalError as error:
                if is_full(error):
                    raise StorageFullError(f"{self._name}: no room on the disk", "make room") from error
                if not is_busy(error):
                    raise
                if attempt == ATTEMPTS:
                    raise StorageError(
                        f"{self._name}: another program has held the database for {ATTEMPTS} minutes",
                        "find what writes to it, then run the command again: it goes on from here",
                    ) from error

    def _write(self) -> None:
        new = [number for number in self._states if number >= len(self._stored_ids)]
        with writing(self._engine).begin() as connection:
            ids = self._stored_ids + [self._insert_trial(connection, number) for number in new]
            for number in self._states:
                if number < len(self._stored_ids):
                    row = update(tables.TRIALS).where(tables.TRIALS.c.trial_id == ids[number])
                    connection.execute(row.values(**tables.trial_row(self._get_trial(number))))
            self._write_rows(connection, ids)
        self._stored_ids = ids
        self._stored |= self._changes.keys()
        self._changes, self._states, self._since = {}, {}, None

    def _insert_trial(self, connection: Connection, number: int) -> int:
        trials = tables.TRIALS
        count = select(func.count()).select_from(trials).where(trials.c.study_id == self._database_study)
        if connection.scalar(count) != number:
            raise StorageError(
                "another program has added trials to the study, or deleted it, while it was searched",
                "let one search at a time run on a study, then run this one again",
            )
        row = tables.trial_row(self._get_trial(number))
        result = connection.execute(
            insert(trials).values(study_id=self._database_study, number=number, **row)
        )
        assert result.inserted_primary_key is not None, "trial_id is generated"
        return int(result.inserted_primary_key[0])

    def _write_rows(self, connection: Connection, ids: list[int]) -> None:
        new: dict[Table, list[dict[str, Any]]] = defaultdict(list)
        for (table, number, key), values in self._changes.items():
            owner = ("study_id", self._database_study) if number is None else ("trial_id", ids[number])
            if (table, number, key) in self._stored:
                same = (table.c[owner[0]] == owner[1]) & (table.c[tables.KEYS[table]] == key)
                connection.execute(update(table).where(same).values(**values))
            else:
                new[table].append({owner[0]: owner[1], tables.KEYS[table]: key, **values})
        for table, rows in new.items():
            connection.execute(insert(table), rows)

    def _changed(self, table: Table, trial: int | None, key: Any, values: dict[str, Any]) -> None:
        if self._reading:
            self._stored.add((table, trial, key))
            return
        self._changes[table, trial, key] = values
        self._touched()

    def _touched(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    # Optuna's interface. With one study, a trial's id in memory is its number.

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Optuna's."""
        number = super().create_new_trial(study_id, template_trial)
        self._complete = None
        if not self._reading:
            self._states[number] = None
            self._touched()
        if template_trial is not None:
            self._template(number, template_trial)
        return number

    def _template(self, number: int, trial: FrozenTrial) -> None:
        for name, value in trial.params.items():
            self._param(
                number, name, trial.distributions[name].to_internal_repr(value), trial.distributions[name]
            )
        attributes_of = {tables.USER_ATTRS: trial.user_attrs, tables.SYSTEM_ATTRS: trial.system_attrs}
        for table, attributes in attributes_of.items():
            for key, attribute in attributes.items():
                self._changed(table, number, key, {"value_json": json.dumps(attribute)})
        for step, score in trial.intermediate_values.items():
            self._step(number, step, score)
        self._values(number, trial.values)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Optuna's."""
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._param(trial_id, param_name, param_value_internal, distribution)

    def _param(self, number: int, name: str, value: float, distribution: BaseDistribution) -> None:
        row = {"param_value": value, "distribution_json": distribution_to_json(distribution)}
        self._changed(tables.PARAMS, number, name, row)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Optuna's."""
        done = super().set_trial_state_values(trial_id, state, values)
        self._complete = None
        if done:
            if state.is_finished():
                self._forget_epochs(self._get_trial(trial_id))
            self._states[trial_id] = None
            self._touched()
            self._values(trial_id, values)
        return done

    def _values(self, number: int, values: Sequence[float] | None) -> None:
        for objective, value in enumerate(values or ()):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            self._changed(tables.VALUES, number, objective, {"value": stored, "value_type": kind})

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Optuna's."""
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._step(trial_id, step, intermediate_value)

    def _step(self, number: int, step: int, score: float) -> None:
        stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(score)
        row = {"intermediate_value": stored, "intermediate_value_type": kind}
        self._changed(tables.STEPS, number, step, row)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Optuna's."""
        super().set_trial_user_attr(trial_id, key, value)
        self._changed(tables.USER_ATTRS, trial_id, key, {"value_json": json.dumps(value)})

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Optuna's."""
        super().set_trial_system_attr(trial_id, key, value)
        self._changed(tables.SYSTEM_ATTRS, trial_id, key, {"value_json": json.dumps(value)})

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Optuna's."""
        super().set_study_user_attr(study_id, key, value)
        self._changed(tables.STUDY_USER_ATTRS, None, key, {"value_json": json.dumps(value)})

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Optuna's."""
        super().set_study_system_attr(study_id, key, value)
        self._changed(tables.STUDY_SYSTEM_ATTRS, None, key, {"value_json": json.dumps(value)})


def hold(
    study: optuna.Study, database: RDBStorage, check_lock: Check = no_check
) -> tuple[optuna.Study, WriteThroughStorage]:
    """The same study with its sampler and pruner, held in memory. Its lock must be held too."""
    storage = WriteThroughStorage(database, study.study_name, check_lock)
    held = optuna.load_study(
        study_name=study.study_name, storage=storage, sampler=study.sampler, pruner=study.pruner
    )
    return held, storage
