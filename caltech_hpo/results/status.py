"""What is going on: the queue, and the studies with their running trials."""

from __future__ import annotations

from caltech_hpo.results.work_queue import Submission, submissions
from caltech_hpo.search.changes import SPEC_ATTR
from caltech_hpo.search.records import best_record, finished_count, trial_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import find_study, open_existing, study_names
from caltech_hpo.spec import Frozen


class RunningTrial(Frozen):
    """A trial that has begun and not ended; `validation` is its latest top-1 accuracy, 0 to 1."""

    number: int
    epoch: int
    epochs: int
    validation: float | None


class StudyStatus(Frozen):
    """A study's trials by state, and the best complete one's accuracy, 0 to 1."""

    study: str
    finished: int
    failed: int
    best_trial: int | None
    best: float | None
    running: tuple[RunningTrial, ...]


class Status(Frozen):
    """Everything at one moment. `running` trials are a live search's, or wait for the next one."""

    queue: tuple[Submission, ...]
    studies: tuple[StudyStatus, ...]


def read_status(place: Place, *, ended: int = 5) -> Status:
    """The queue, with the latest `ended` of those that have ended; studies that are ours."""
    everything = submissions(place.storage)
    over = [one for one in everything if one.ended]
    shown = tuple(one for one in everything if not one.ended or one in over[len(over) - ended :])
    storage = open_existing(place.storage)
    studies = []
    for name in study_names(storage):
        study = find_study(storage, name)
        if study is not None and SPEC_ATTR in study.user_attrs:
            records = trial_records(study)
            best = best_record(records)
            running = tuple(
                RunningTrial(
                    number=record.number, epoch=len(record.epochs),
                    epochs=record.recipe.epochs if record.recipe else 0,
                    validation=record.epochs[-1].validation_top1 if record.epochs else None,
                )
                for record in records if record.state == "running"
            )  # fmt: skip
            studies.append(
                StudyStatus(
                    study=name, finished=finished_count(records),
                    failed=sum(record.state == "failed" for record in records),
                    best_trial=best.number if best else None, best=best.value if best else None,
                    running=running,
                )
            )  # fmt: skip
    return Status(queue=shown, studies=tuple(studies))
