"""Retrains the winner and scores the test set, once. The only module that loads the test split."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.dataset import DatasetIndex, scan
from caltech_hpo.data.loading import load_search_data, load_test_data
from caltech_hpo.errors import CaltechHpoError, DataError, UsageError
from caltech_hpo.results.ledger import FINAL_ATTR, FinalResult
from caltech_hpo.results.model_files import describe_model, publish, write_json
from caltech_hpo.results.plots import draw_confusion, draw_training_curves
from caltech_hpo.results.scores import confusion_matrix, mean_per_class, top1, wilson_interval
from caltech_hpo.search.changes import DATA_ATTR, SPEC_ATTR
from caltech_hpo.search.locks import held, lock_path
from caltech_hpo.search.messages import Died, EpochDone, Failed, Finished, Job, WorkerBugError
from caltech_hpo.search.records import TrialRecord, best_record, trial_records
from caltech_hpo.search.request import Place, Say, silent
from caltech_hpo.search.run import locate_data, open_executor
from caltech_hpo.search.storage import stored_study
from caltech_hpo.spec import EpochResult, FitOn, Recipe, StudySpec

if TYPE_CHECKING:
    import optuna

    from caltech_hpo.training.loop import Evaluation


@dataclass(frozen=True)
class FinalPlan:
    """What `final` is about to do.

    `stored` is the score of the same recipe, if it was taken before; the data is then not looked at,
    and `index` is None.
    """

    study: optuna.Study
    record: TrialRecord
    recipe: Recipe
    folder: Path
    stored: FinalResult | None
    index: DatasetIndex | None
    place: Place


def plan_final(
    name: str, place: Place, *, fit_on: FitOn = "train", progress: Progress | None = None, say: Say = silent
) -> FinalPlan:
    """Finds the best trial and checks that its data set is at hand.

    Raises UsageError without a stored study or a complete trial, DataError for other data.
    """
    study = stored_study(place.storage, name)
    record = best_record(trial_records(study))
    if record is None or record.recipe is None:
        raise UsageError(
            f"study '{name}' has no complete trial yet",
            f"run 'caltech-hpo search --study {name} --trials N' first",
        )
    recipe = record.recipe
    if fit_on == "train+val":
        recipe = recipe.model_copy(update={"fit_on": fit_on, "epochs": record.best_epoch})
    folder = place.models / f"{name}-trial{record.number}-{recipe.hash[:8]}"
    stored = recorded_result(study, recipe, folder)
    if stored is not None:
        return FinalPlan(study, record, recipe, folder, stored, None, place)
    spec = StudySpec.model_validate_json(study.user_attrs[SPEC_ATTR])
    index = scan(locate_data(spec, place, progress=progress, say=say))
    if index.fingerprint != study.user_attrs[DATA_ATTR]:
        raise DataError(
            f"{index.root}: not the data that study '{name}' searched on (other images, classes or split)",
            "give the same folder as for the search: --data DIR",
        )
    return FinalPlan(study, record, recipe, folder, None, index, place)


def recorded_result(study: optuna.Study, recipe: Recipe, folder: Path) -> FinalResult | None:
    """The score of this recipe that the database holds, or that an interrupted call left in the folder."""
    in_database = study.user_attrs.get(f"{FINAL_ATTR}{recipe.hash}")
    if in_database is not None:
        return FinalResult.model_validate(in_database)
    in_folder = stored_result(folder)
    if in_folder is not None:
        remember(study, in_folder)
    return in_folder


def remember(study: optuna.Study, result: FinalResult) -> None:
    """Records a score in the study, for the report."""
    study.set_user_attr(f"{FINAL_ATTR}{result.recipe_hash}", result.model_dump(mode="json"))


def stored_result(folder: Path) -> FinalResult | None:
    """What an earlier `final` wrote into the folder, or None."""
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        return None
    return FinalResult.model_validate(json.loads(metrics.read_text(encoding="utf-8"))["result"])


def retrain(
    plan: FinalPlan, *, device: str, skip_unreadable: bool = False, progress: Progress | None = None
) -> Iterator[EpochResult]:
    """Trains the recipe in a worker, keeping the best epoch's weights in the folder being made.

    "train" keeps the best validation epoch; "train+val" the last one. Raises CaltechHpoError when
    the training fails.
    """
    assert plan.index is not None, "the recipe has its score"
    # Decoded now, so that an unreadable test image is found before the training and not after it.
    load_test_data(
        plan.index, plan.recipe.resize, plan.place.cache, skip_unreadable=skip_unreadable, progress=progress
    )
    data = load_search_data(
        plan.index, plan.recipe.resize, plan.place.cache, skip_unreadable=skip_unreadable, progress=progress
    )
    folder = unfinished(plan)
    shutil.rmtree(folder, ignore_errors=True)
    with open_executor(plan.recipe, data, device=device) as executor:
        executor.submit(Job(plan.record.number, plan.recipe, keep=folder / "model.safetensors"))
        while not isinstance(event := executor.next_event(), Finished):
            if not isinstance(event, EpochDone):
                raise _failure(event)
            yield event.result
            executor.answer(event.job, True)


def _failure(event: Failed | Died) -> Exception:
    """What a training that did not finish raises: a bug is a bug, the rest is the user's to mend."""
    if isinstance(event, Died):
        return CaltechHpoError(
            f"training failed: the worker died (exit code {event.exit_code})", "run the command again"
        )
    if event.kind == "bug":
        return WorkerBugError(event.message)
    return CaltechHpoError(f"training failed: {event.kind}: {event.message}", "mend that and run it again")


@contextlib.contextmanager
def final_lock(plan: FinalPlan) -> Iterator[FinalResult | None]:
    """One `final` of a recipe at a time; yields the score if another one took it meanwhile."""
    lock = lock_path(plan.place.storage, plan.place.home, f"final-{plan.folder.name}")
    with held(lock, f"final training of study '{plan.study.study_name}'"):
        yield recorded_result(plan.study, plan.recipe, plan.folder)


def unfinished(plan: FinalPlan) -> Path:
    """The folder being written, beside the one that it becomes."""
    return plan.folder.with_name(f".{plan.folder.name}.unfinished")


def score(
    plan: FinalPlan, epochs: list[EpochResult], *, device: str, skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> FinalResult:  # fmt: skip
    """Scores the kept weights on the test split, writes everything into the folder, then records it."""
    assert plan.index is not None, "the recipe has its score"
    test = load_test_data(
        plan.index, plan.recipe.resize, plan.place.cache, skip_unreadable=skip_unreadable, progress=progress
    )
    folder = unfinished(plan)
    evaluation = _evaluate(plan.recipe, folder / "model.safetensors", test, device)
    matrix = confusion_matrix(evaluation.labels.numpy(), evaluation.predictions.numpy(), len(test.classes))
    validated = [result for result in epochs if result.validation_top1 is not None]
    best = max(validated, key=lambda result: result.validation_top1 or 0.0, default=epochs[-1])
    result = FinalResult(
        study=plan.study.study_name,
        trial=plan.record.number,
        params=plan.record.params,
        best_epoch=best.epoch,
        val_accuracy=best.validation_top1,
        test_accuracy=top1(matrix),
        test_mean_per_class_accuracy=mean_per_class(matrix),
        test_images=int(matrix.sum()),
        ci95=wilson_interval(int(matrix.trace()), int(matrix.sum())),
        fit_on=plan.recipe.fit_on,
        model=str(plan.folder / "model.safetensors"),
        recipe_hash=plan.recipe.hash,
    )
    title = f"{result.study}, trial {result.trial}"
    draw_training_curves(epochs, title, folder / "curves.png")
    draw_confusion(
        matrix, test.classes, f"{title}: test top-1 {result.test_accuracy:.3f}", folder / "confusion.png"
    )
    document = {
        "result": result.model_dump(mode="json"),
        "test_loss": evaluation.loss,
        "confusion_matrix": matrix.tolist(),
        "epochs": [epoch.model_dump(mode="json") for epoch in epochs],
    }
    write_json(folder / "model.json", describe_model(plan.recipe, test.classes))
    write_json(folder / "metrics.json", document)
    publish(folder, plan.folder)
    remember(plan.study, result)
    return result


def _evaluate(recipe: Recipe, weights: Path, test: Any, device_name: str) -> Evaluation:
    import torch

    from caltech_hpo.training.checkpoint import load_weights
    from caltech_hpo.training.device import resolve_device
    from caltech_hpo.training.loop import evaluate, plan_for
    from caltech_hpo.training.models import build_model

    device = resolve_device(device_name)
    model = build_model(recipe.architecture, "none", recipe.classes, seed=0)
    load_weights(model, weights)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return evaluate(model, test.open_test(), plan_for(recipe, device), recipe.precision)
