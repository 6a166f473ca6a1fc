"""What is going on: the queue, and the studies with their running trials."""

from __future__ import annotations

import contextlib

from optuna.storages import RDBStorage
from optuna.trial import TrialState

from caltech_hpo.results.work_queue import Submission, submissions
from caltech_hpo.search.changes import SPEC_ATTR
from caltech_hpo.search.locks import CONFIRM, FINAL, SERVE, holders_of
from caltech_hpo.search.records import TrialRecord, trial_record
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import open_existing, study_names
from caltech_hpo.spec import Frozen
from caltech_hpo.study_files import base_name


class RunningTrial(Frozen):
    """A trial that has begun and not ended; `validation` is its latest top-1 accuracy, 0 to 1."""

    number: int
    epoch: int
    epochs: int
    validation: float | None


class StudyStatus(Frozen):
    """A study's trials by state, and the best complete one's accuracy, 0 to 1.

    `searched_by` is the process that searches it: without one, `running` trials wait for the next search.
    `confirmed_by` and `final_by` are those of the other commands that train; NAME and NAME@2 share `final`.
    """

    study: str
    finished: int
    failed: int
    best_trial: int | None
    best: float | None
    running: tuple[RunningTrial, ...]
    searched_by: str | None
    confirmed_by: str | None = None
    final_by: str | None = None


class Status(Frozen):
    """Everything at one moment; `served_by` is the process that works on the queue."""

    served_by: str | None
    queue: tuple[Submission, ...]
    studies: tuple[StudyStatus, ...]


def read_status(place: Place, *, ended: int = 5) -> Status:
    """The queue, with the latest `ended` of those that have ended; studies that are ours."""
    everything = submissions(place.storage)
    over = [one for one in everything if one.ended]
    shown = tuple(one for one in everything if not one.ended or one in over[len(over) - ended :])
    storage = open_existing(place.storage)
    if storage is None:
        return Status(served_by=None, queue=shown, studies=())
    names = study_names(storage)
    locks = [lock for name in names for lock in (name, CONFIRM + name, FINAL + base_name(name))]
    holders = holders_of(place.storage, place.home, [SERVE, *locks])
    studies = [_status(storage, name, holders) for name in names]
    return Status(
        served_by=holders.get(SERVE), queue=shown,
        studies=tuple(study for study in studies if study is not None),
    )  # fmt: skip


def _status(storage: RDBStorage, name: str, holders: dict[str, str]) -> StudyStatus | None:
    """Counted by the database, so that a long study can be watched; None for other programs' studies."""
    study_id = storage.get_study_id_from_name(name)
    if SPEC_ATTR not in storage.get_study_user_attrs(study_id):
        return None
    best = None
    with contextlib.suppress(ValueError):  # no trial is complete
        best = storage.get_best_trial(study_id)
    running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
    return StudyStatus(
        study=name,
        finished=storage.get_n_trials(study_id, (TrialState.COMPLETE, TrialState.PRUNED)),
        failed=storage.get_n_trials(study_id, (TrialState.FAIL,)),
        best_trial=best.number if best else None,
        best=best.value if best else None,
        running=tuple(_running(trial_record(trial)) for trial in running),
        searched_by=holders.get(name),
        confirmed_by=holders.get(CONFIRM + name),
        final_by=holders.get(FINAL + base_name(name)),
    )


def _running(record: TrialRecord) -> RunningTrial:
    return RunningTrial(
        number=record.number, epoch=len(record.epochs), epochs=record.recipe.epochs if record.recipe else 0,
        validation=record.epochs[-1].validation_top1 if record.epochs else None,
    )  # fmt: skip
