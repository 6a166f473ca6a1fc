"""The hand-tuned rows of a study that are still to be run."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from caltech_hpo.search.records import BASELINE_ATTR, lacked_memory
from caltech_hpo.search.running import LAGGING
from caltech_hpo.spec import StudySpec
from caltech_hpo.study_files import complete_params


class HandTunedRows:
    """Queues each row once. `published` are the names of those with figures to compare with."""

    def __init__(self, spec: StudySpec, trials: Sequence[FrozenTrial], *, wanted: bool) -> None:
        """`trials` are the study's so far; without `wanted` no row is queued."""
        self._spec = spec
        self.published = {row.name for row in spec.baselines if row.published.has_figures}
        # A failed row is not tried again by itself: the same row would fail the same way.
        seen = {
            trial.user_attrs.get(BASELINE_ATTR) for trial in trials
            if not self._cut_short(trial) and not lacked_memory(str(trial.user_attrs.get("stop_reason", "")))
        }  # fmt: skip
        self._left = [row for row in spec.baselines if row.name not in seen] if wanted else []

    def _cut_short(self, trial: FrozenTrial) -> bool:
        """Whether a row with published figures lagged: it must run to its end to be compared with them."""
        lagged = str(trial.user_attrs.get("stop_reason", "")).startswith(LAGGING)
        return lagged and trial.user_attrs.get(BASELINE_ATTR) in self.published

    def queue_next(self, study: optuna.Study) -> None:
        """Queues a row, one at a time: waiting trials empty the dashboard's parallel coordinates."""
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if self._left and not waiting:
            row = self._left.pop(0)
            study.enqueue_trial(complete_params(self._spec, row.params), user_attrs={BASELINE_ATTR: row.name})
