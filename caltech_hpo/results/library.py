"""What the commands do, as functions: `from caltech_hpo import load_study, search, confirm, final, predict`.

Searches start processes: a script needs `if __name__ == "__main__":` around the call, a notebook does not.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caltech_hpo.errors import UsageError
from caltech_hpo.results.confirm import confirmed, open_confirm, run_confirm
from caltech_hpo.results.confirm_events import ConfirmEvent
from caltech_hpo.results.ledger import FinalResult
from caltech_hpo.results.plan import plan_finals
from caltech_hpo.results.predict import Prediction, find_model, image_files
from caltech_hpo.results.predict import predict as predicted
from caltech_hpo.results.ranking import Confirmation
from caltech_hpo.results.retraining import RetrainingEpoch, Scored, run_finals
from caltech_hpo.search.records import TrialRecord, best_record, trial_records
from caltech_hpo.search.request import Place, Say, SearchRequest, silent
from caltech_hpo.search.run import open_search
from caltech_hpo.search.storage import stored_study
from caltech_hpo.search.urls import default_url
from caltech_hpo.spec import EpochResult, Frozen, StudySpec
from caltech_hpo.study_files import load_study as load_study_file
from caltech_hpo.study_files import read_study
from caltech_hpo.terms import FitOn
from caltech_hpo.units import bytes_of

if TYPE_CHECKING:
    from caltech_hpo.search.events import SearchEvent

FolderLike = str | Path
HOME = "storage"


class SearchResult(Frozen):
    """A study after a search: all of its trials by number, and the best complete one (None without any)."""

    study: str
    trials: tuple[TrialRecord, ...]
    best: TrialRecord | None


def load_study(study: FolderLike) -> StudySpec:
    """The declaration of a study: by its name (NAME@2 is its second search), or a TOML file's by its path.

    Raises UsageError for an unknown name, SpecError for a faulty file.
    """
    path = Path(study)
    if path.suffix == ".toml":
        return read_study(path)
    return load_study_file(str(study)).model_copy(update={"name": str(study)})


def search(
    study: StudySpec | str, *, trials: int, data: FolderLike | None = None, home: FolderLike = HOME,
    storage: str | None = None, workers: int = 1, device: str = "auto", seed: int = 0, baselines: bool = True,
    pruning: bool = True, enqueue: Sequence[dict[str, Any]] = (), timeout_minutes: float | None = None,
    memory_gib: float | None = None, skip_unreadable: bool = False,
    on_event: Callable[[SearchEvent], None] | None = None, say: Say = silent,
) -> SearchResult:  # fmt: skip
    """Runs trials until the study has `trials` finished ones; called again, it goes on.

    Options are those of `caltech-hpo search`: no trial begins after `timeout_minutes`, and all workers
    together train in `memory_gib` GiB (None: most of what is free). `on_event` is told every trial and epoch
    once it is in the database; what it raises ends the search, which the next call goes on with. Raises
    CaltechHpoError.
    """
    _require(trials=trials, workers=workers, timeout_minutes=timeout_minutes, memory_gib=memory_gib)
    spec = load_study(study) if isinstance(study, str) else study
    place = _place(home, storage, data)
    request = SearchRequest(
        spec.name, trials, workers=workers, device=device, seed=seed, baselines=baselines, pruning=pruning,
        enqueue=tuple(enqueue), timeout_minutes=timeout_minutes, memory=bytes_of(memory_gib),
        skip_unreadable=skip_unreadable, spec=spec,
    )  # fmt: skip
    with open_search(request, place, say=say) as opened:
        for event in opened.events:
            if on_event:
                on_event(event)
    records = trial_records(stored_study(place.storage, spec.name))
    return SearchResult(study=spec.name, trials=tuple(records), best=best_record(records))


def confirm(
    study: StudySpec | str, *, finalists: int = 3, seeds: int = 3, data: FolderLike | None = None,
    home: FolderLike = HOME, storage: str | None = None, workers: int = 1, device: str = "auto",
    memory_gib: float | None = None, skip_unreadable: bool = False,
    on_event: Callable[[ConfirmEvent], None] | None = None, say: Say = silent,
) -> Confirmation:  # fmt: skip
    """Retrains the best trials over fresh seeds and ranks them; called again, it goes on.

    Memory is as in `search`. Raises CaltechHpoError.
    """
    _require(finalists=finalists, seeds=seeds, workers=workers, memory_gib=memory_gib)
    name, place = _name(study), _place(home, storage, data)
    with open_confirm(name, place, finalists=finalists, seeds=seeds, say=say) as plan:
        events = run_confirm(
            plan, workers=workers, device=device, memory=bytes_of(memory_gib),
            skip_unreadable=skip_unreadable, say=say,
        )  # fmt: skip
        with contextlib.closing(events):
            for event in events:
                if on_event:
                    on_event(event)
    made = confirmed(place.storage, name)
    assert made is not None, "every seed is whole"
    return made


def final(
    study: StudySpec | str, *, fit_on: FitOn = "train", seeds: int = 1, trial: int | None = None,
    again: str | None = None, allow_leak: bool = False, data: FolderLike | None = None,
    home: FolderLike = HOME, storage: str | None = None, workers: int = 1, device: str = "auto",
    memory_gib: float | None = None, skip_unreadable: bool = False,
    on_epoch: Callable[[EpochResult], None] | None = None, say: Say = silent,
) -> list[FinalResult]:  # fmt: skip
    """Retrains the winner and scores the test set, once for each seed; what was scored before is read.

    One result for each seed; `workers` of them train at once, and `on_epoch` is told the epochs of all.
    Memory is as in `search`.
    Raises CaltechHpoError, also where another configuration was scored before and `again` gives no reason.
    """
    _require(seeds=seeds, workers=workers, memory_gib=memory_gib)
    place = _place(home, storage, data)
    plans = plan_finals(_name(study), place, fit_on=fit_on, seeds=seeds, trial=trial, again=again, say=say)
    events = run_finals(
        plans, device=device, workers=workers, memory=bytes_of(memory_gib),
        skip_unreadable=skip_unreadable, allow_leak=allow_leak, say=say,
    )  # fmt: skip
    results = {}
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Scored):
                results[event.plan.recipe.hash] = event.result
            elif isinstance(event, RetrainingEpoch) and on_epoch:
                on_epoch(event.result)
    return [results[plan.recipe.hash] for plan in plans]


def predict(
    images: FolderLike | Sequence[FolderLike], study: StudySpec | str | None = None, *,
    model: FolderLike | None = None, top: int = 5, home: FolderLike = HOME, storage: str | None = None,
    device: str = "auto",
) -> list[Prediction]:  # fmt: skip
    """The likeliest classes of image files, or of all images in folders, by a study's model or `model`.

    A file that cannot be read has its `problem`. Raises CaltechHpoError.
    """
    _require(top=top)
    several = [images] if isinstance(images, (str, Path)) else list(images)
    name = None if study is None else _name(study)
    chosen = find_model(name, _place(home, storage, None), None if model is None else Path(model))
    return list(
        predicted(chosen.model, image_files([Path(image) for image in several]), device=device, top=top)
    )


def _require(**given: float | None) -> None:
    """Refuses what is no number above 0. Raises UsageError."""
    for name, value in given.items():
        if value is not None and not (isinstance(value, numbers.Real) and value > 0):
            raise UsageError(f"{name}: {value!r}", "give a number above 0")


def _name(study: StudySpec | str) -> str:
    if isinstance(study, str):
        return load_study(study).name if study.endswith(".toml") else study
    return study.name


def _place(home: FolderLike, storage: str | None, data: FolderLike | None) -> Place:
    folder = Path(home)
    return Place(folder, storage or default_url(folder), None if data is None else Path(data))
