"""Which trained model a study has, and its answers to image files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.decode import decode_all
from caltech_hpo.data.folders import is_class_name, is_image_name
from caltech_hpo.errors import DataError, UsageError
from caltech_hpo.results import ledger
from caltech_hpo.results.confirm import confirmed
from caltech_hpo.results.evidence import of_trials
from caltech_hpo.results.model_files import WEIGHTS, has_weights, kept_folder
from caltech_hpo.results.plan import choose_trial
from caltech_hpo.search.records import best_record, trial_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import stored_study
from caltech_hpo.search.trial_files import best_weights
from caltech_hpo.spec import Frozen

if TYPE_CHECKING:
    from caltech_hpo.training.trained import TrainedModel

CHUNK = 256  # images that are decoded and in memory at a time


class Prediction(Frozen):
    """The model's first choices for a file, the likeliest first; `probabilities` are 0 to 1.

    `problem` says why the file could not be read; it then has no classes.
    """

    file: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Chosen:
    """A model, and in words which one it is."""

    model: TrainedModel
    words: str


def find_model(
    study: str | None, place: Place, path: Path | None = None, *, held_out: bool = False
) -> Chosen:  # fmt: skip
    """The model at `path`, or a study's: what `final` trained of its winner, else its best trial's.

    With `held_out` none that was trained on the validation images too.

    Raises UsageError for an unknown study, or one that has left no weights; WeightsError for a faulty file.
    """
    from caltech_hpo.training.trained import read_trained

    if path is not None:
        return Chosen(read_trained(path), str(path))
    if study is None:
        raise UsageError("which model?", "give --study NAME, or --model FILE")
    records = trial_records(stored_study(place.storage, study))
    scores = [
        (row, folder)
        for row in of_trials(ledger.scores(place.storage, study), records)
        if not (held_out and row.fit_on != "train")
        and (folder := kept_folder(row.model_file, place.models))
        and has_weights(folder)
    ]
    confirmation, best = confirmed(place.storage, study), best_record(records)
    wanted = choose_trial(study, records, None, confirmation)[0].number if best else None
    winners = [(row, folder) for row, folder in scores if row.trial == wanted] or scores
    if winners:
        row, folder = winners[0]
        words = f"final on trial {row.trial}, seed {row.seed}, fitted on {row.fit_on}"
        return Chosen(read_trained(folder / WEIGHTS), f"{words}, test top-1 {row.top1:.4f}")
    for file in best_weights(place.best_weights, study):
        number = int(file.stem.rpartition("trial")[2])
        record = next((record for record in records if record.number == number), None)
        trained = read_trained(file)
        if record is not None and record.recipe is not None and record.recipe.hash == trained.recipe.hash:
            words = f"the search's best, trial {number}, validation top-1 {record.value or 0.0:.4f}"
            return Chosen(trained, words)
    again = " --retrain" if of_trials(ledger.scores(place.storage, study), records) else ""
    raise UsageError(
        f"study '{study}' has left no weights in {place.models}",
        f"run 'caltech-hpo final --study {study}{again}', or give --model FILE",
    )


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and all images below the folders, sorted. Raises DataError for what is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(_below(path))
            if not inside:
                raise DataError(f"{path}: no images in this folder", "give jpg, png, webp, bmp or tiff files")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: there is no such file", "check the path")
    return found


def _below(folder: Path) -> Iterator[Path]:
    """Links to folders are not followed: they may lead round in circles."""
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if is_class_name(name)]
        yield from (Path(where) / name for name in names if is_image_name(name))


def predict(
    trained: TrainedModel, files: Sequence[Path], *, device: str = "auto", top: int = 5,
    progress: Progress | None = None,
) -> Iterator[Prediction]:  # fmt: skip
    """The `top` classes of each file, in order. Raises UsageError for an unknown device, WeightsError."""
    from caltech_hpo.training.device import resolve_device
    from caltech_hpo.training.trained import load_model, probabilities

    where = resolve_device(device)
    model = load_model(trained, where)
    done = 0
    for chunk in _chunks(files):
        decoded = list(decode_all(chunk, trained.recipe.resize))
        images = [pixels for pixels in decoded if not isinstance(pixels, str)]
        rows = iter(probabilities(model, trained.recipe, images, where))
        for file, pixels in zip(chunk, decoded, strict=True):
            if isinstance(pixels, str):
                yield Prediction(file=str(file), problem=pixels)
            else:
                best = next(rows).topk(min(top, len(trained.classes)))
                names = tuple(trained.classes[i] for i in best.indices.tolist())
                yield Prediction(file=str(file), classes=names, probabilities=tuple(best.values.tolist()))
        done += len(chunk)
        if progress:
            progress("predicting", done, len(files))


def _chunks(files: Sequence[Path]) -> Iterable[Sequence[Path]]:
    return (files[i : i + CHUNK] for i in range(0, len(files), CHUNK))
