"""Scores a retrained recipe on the test set, once. The only module that loads the test split."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from caltech_hpo import __version__
from caltech_hpo.data.cache import Progress, read_index
from caltech_hpo.data.dataset import DatasetIndex
from caltech_hpo.data.duplicates import TEST, Group
from caltech_hpo.data.loading import (
    SearchData,
    TestData,
    left_out,
    load_search_data,
    load_test_data,
    named_images,
    unreadable_classes,
)
from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.results import ledger
from caltech_hpo.results.leaks import count_leaked, find_leaks, refuse_leaks
from caltech_hpo.results.ledger import FinalResult, ScoreRow
from caltech_hpo.results.model_files import WEIGHTS, publish, write_json
from caltech_hpo.results.plan import FinalPlan, check_again, read_score, stored_score
from caltech_hpo.results.plots import draw_confusion, draw_training_curves
from caltech_hpo.results.scores import Labels, confusion_matrix, mean_per_class, top1, wilson_interval
from caltech_hpo.results.trainings import require_same_images
from caltech_hpo.search import locks
from caltech_hpo.search.locks import Check
from caltech_hpo.search.request import Say, silent
from caltech_hpo.spec import EpochResult
from caltech_hpo.training.checkpoint_files import remove_checkpoint

if TYPE_CHECKING:
    from caltech_hpo.training.loop import Evaluation
    from caltech_hpo.training.trained import TrainedModel

METRICS, CONFUSION = "metrics.json", "confusion.png"


def final_lock(plan: FinalPlan) -> AbstractContextManager[Check]:
    """One `final` of a study and its repetitions at a time. Raises StorageError while another one runs."""
    return locks.final_lock(plan.place.storage, plan.place.home, plan.study)


def taken_meanwhile(plan: FinalPlan) -> FinalResult | None:
    """The score if it is known by now; `final_lock` must be held.

    Another call may have taken it, or an interrupted one may have left it in its unfinished folder, which
    is then finished. Raises UsageError as `plan_finals` does, if another configuration was scored meanwhile.
    """
    left = read_score(plan.unfinished, plan.study, plan.record)
    if left is not None:
        ledger.record(plan.place.storage, left)
        finish(plan)
    family = ledger.family_scores(plan.place.storage, plan.study)
    stored = stored_score(family, plan.recipe)
    if stored is None:
        check_again(plan.study, family, plan.record.number, plan.recipe.configuration, plan.again)
    return stored


def is_settled(plan: FinalPlan) -> bool:
    """Whether the recipe has its score and no interrupted call left files to be finished."""
    return plan.stored is not None and not (plan.unfinished / METRICS).is_file()


@dataclass(frozen=True)
class FinalData:
    """What is trained on, and what is scored: None where only weights are wanted. `leaks`: in both."""

    search: SearchData
    test: TestData | None
    leaks: Sequence[Group] = ()


def load_data(
    plan: FinalPlan, *, scoring: bool, skip_unreadable: bool = False, allow_leak: bool = False,
    progress: Progress | None = None, say: Say = silent,
) -> FinalData:  # fmt: skip
    """Decodes everything now, so that a test image's fault is found before a training and not after it.

    Raises DataError if test images are among the training or validation images, unless `allow_leak` says
    that they may be.
    """
    assert plan.index is not None, "a recipe without its score, or its weights, needs the data"
    place = (plan.index, plan.recipe.resize, plan.place.cache)
    test = load_test_data(*place, skip_unreadable=skip_unreadable, progress=progress) if scoring else None
    search = load_search_data(*place, skip_unreadable=skip_unreadable, progress=progress)
    require_same_images(plan.recipe, search, plan.index)
    if missing := left_out(search.caches | ({"test": test.test_cache} if test else {})):
        say(missing)
    if test and (untested := unreadable_classes(plan.index, plan.index.test, test.test_cache)):
        say(f"without a readable test image, so not in the score: {', '.join(untested)}")
    if test is None:
        return FinalData(search, None)
    leaks = _leaks(plan.index, test, search)
    refuse_leaks(plan.study, leaks, say, allowed=allow_leak)
    return FinalData(search, test, leaks)


def checkpoint_of(plan: FinalPlan) -> Path:
    """Kept until there is a score: whatever ends the scoring, the training is not repeated."""
    return plan.unfinished / "training.checkpoint"


def score(plan: FinalPlan, epochs: Sequence[EpochResult], data: FinalData, *, device: str) -> FinalResult:
    """Scores the kept weights on the test split; records the score before anything else is done with it.

    `final_lock` must be held. Whatever ends the call after the scoring, the score is in the ledger or
    in the folder, from where the next call takes it.
    """
    test = data.test
    assert test is not None, "the data was loaded to be scored"
    evaluation = _evaluate(plan, test, device, epochs[-1].micro_batch)
    matrix = confusion_matrix(evaluation.labels.numpy(), evaluation.predictions.numpy(), len(test.classes))
    result = _result(plan, epochs, matrix, evaluation.top1_flip, count_leaked(data.leaks))
    row = _score_row(plan, result, test)
    document = {
        "result": row.result.model_dump(mode="json"),
        "score": row.model_dump(mode="json", exclude={"id", "result"}),
        "test_loss": evaluation.loss,
        "confusion_matrix": matrix.tolist(),
        "leaks": [group.names for group in data.leaks],
        "epochs": [epoch.model_dump(mode="json") for epoch in epochs],
    }
    write_json(plan.unfinished / METRICS, document)
    kept = ledger.record(plan.place.storage, row)
    finish(plan)
    return kept.result


def restore(plan: FinalPlan, epochs: Sequence[EpochResult]) -> None:
    """Gives the weights of a scored recipe, trained again, their place; the test set is not looked at.

    `metrics.json` and the confusion matrix came from the test images: they are kept, where they are.
    """
    assert plan.index is not None
    folder = plan.unfinished
    write_json(folder / "model.json", _trained(plan, plan.index.classes).description)
    draw_training_curves(epochs, f"{plan.study}, trial {plan.record.number}", folder / "curves.png")
    remove_checkpoint(checkpoint_of(plan))
    for kept in (CONFUSION, METRICS):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(plan.folder / kept, folder / kept)
    publish(folder, plan.folder)


def _trained(plan: FinalPlan, classes: tuple[str, ...]) -> TrainedModel:
    from caltech_hpo.training.trained import TrainedModel

    return TrainedModel(plan.unfinished / WEIGHTS, plan.recipe, classes)


def finish(plan: FinalPlan) -> None:
    """Draws what the unfinished folder's metrics tell and moves the folder to its name."""
    folder = plan.unfinished
    remove_checkpoint(checkpoint_of(plan))
    document = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    classes = json.loads((folder / "model.json").read_text(encoding="utf-8"))["classes"]
    epochs = [EpochResult.model_validate(epoch) for epoch in document["epochs"]]
    matrix = np.array(document["confusion_matrix"], dtype=np.int64)
    title = f"{plan.study}, trial {plan.record.number}"
    draw_training_curves(epochs, title, folder / "curves.png")
    draw_confusion(matrix, classes, f"{title}: test top-1 {top1(matrix):.3f}", folder / CONFUSION)
    publish(folder, plan.folder)


def _result(
    plan: FinalPlan, epochs: Sequence[EpochResult], matrix: Labels, top1_flip: float | None, leaks: int
) -> FinalResult:
    validated = [result for result in epochs if result.validation_top1 is not None]
    best = max(validated, key=lambda result: result.validation_top1 or 0.0, default=epochs[-1])
    return FinalResult(
        study=plan.study,
        trial=plan.record.number,
        params=plan.record.params,
        best_epoch=best.epoch,
        val_accuracy=best.validation_top1,
        test_accuracy=top1(matrix),
        test_mean_per_class_accuracy=mean_per_class(matrix),
        test_accuracy_flip=top1_flip,
        test_images=int(matrix.sum()),
        leaks=leaks,
        ci95=wilson_interval(int(matrix.trace()), int(matrix.sum())),
        fit_on=plan.recipe.fit_on,
        model=str(plan.folder / WEIGHTS),
        recipe_hash=plan.recipe.hash,
        seed=plan.recipe.seed,
    )


def _score_row(plan: FinalPlan, result: FinalResult, test: TestData) -> ScoreRow:
    assert plan.index is not None
    left_out = read_index(test.test_cache)["unreadable"]
    return ScoreRow(
        study=plan.study,
        trial=result.trial,
        recipe_hash=result.recipe_hash,
        configuration=plan.recipe.configuration,
        seed=plan.recipe.seed,
        fit_on=result.fit_on,
        model_file=result.model,
        test_list=ledger.list_hash(sample for sample in plan.index.test if sample.path not in left_out),
        test_images=result.test_images,
        top1=result.test_accuracy,
        mean_per_class=result.test_mean_per_class_accuracy,
        taken_at=ledger.now(),
        reason=plan.again,
        version=__version__,
        result=result,
    )


def _leaks(index: DatasetIndex, test: TestData, data: SearchData) -> list[Group]:
    return find_leaks(
        {
            "training": named_images(index.training, data.training_cache),
            "validation": named_images(index.validation, data.validation_cache),
            TEST: named_images(index.test, test.test_cache),
        }
    )


def _evaluate(plan: FinalPlan, test: TestData, device_name: str, at_once: int | None) -> Evaluation:
    """Writes model.json, and scores the kept weights on the test images, `at_once` in memory."""
    from caltech_hpo.training.device import resolve_device
    from caltech_hpo.training.loop import evaluate
    from caltech_hpo.training.sources import ImageSource, plan_for
    from caltech_hpo.training.system_memory import is_out_of_memory
    from caltech_hpo.training.trained import load_model

    recipe, device = plan.recipe, resolve_device(device_name)
    trained = _trained(plan, test.classes)
    write_json(plan.unfinished / "model.json", trained.description)
    source = ImageSource(test.open_test(), plan_for(recipe, device)).in_batches_of(
        at_once or recipe.batch_size
    )
    try:
        model = load_model(trained, device)
        return evaluate(model, source, device, recipe.precision, flip=recipe.test_time_flip)
    except RuntimeError as error:  # other trainings may have the memory
        if not is_out_of_memory(error):
            raise
        raise CaltechHpoError(
            f"no memory to score {plan.unfinished / WEIGHTS}: {str(error).splitlines()[0]}",
            "run it again with --workers 1: it goes on from here",
        ) from error
