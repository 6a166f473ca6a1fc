"""Optuna's database storage, with a faster way to read a whole study."""

from __future__ import annotations

from collections.abc import Container

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from caltech_hpo.search.tables import read_trials


class StudyStorage(RDBStorage):
    """As Optuna's, which makes an object of every row: seconds for a study of 1,000 trials."""

    def _get_trials(
        self, study_id: int, states: Container[TrialState] | None, included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:  # fmt: skip
        if states is None and trial_id_greater_than < 0:
            found = read_trials(self.engine, study_id)
            if found:  # without any it may be that there is no such study, which Optuna's says
                return found
        return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)
