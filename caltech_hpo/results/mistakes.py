"""What a model gets wrong on the validation images: the surest mistakes, the confusions, each class."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from caltech_hpo.data.cache import LabeledImages, Progress
from caltech_hpo.data.decode import Pixels
from caltech_hpo.data.loading import WITHOUT, load_search_data, named_images
from caltech_hpo.errors import DataError, UsageError
from caltech_hpo.results.predict import Chosen
from caltech_hpo.results.scores import confusion_matrix, mean_per_class, top1
from caltech_hpo.results.trainings import searched_data
from caltech_hpo.search.request import Place, Say, silent
from caltech_hpo.search.storage import stored_study
from caltech_hpo.spec import Frozen

CHUNK = 256
PICTURE_QUALITY = 80  # of WebP


class Mistake(Frozen):
    """An image taken for another class: `probability` of the `predicted` one, `own` of its own, 0 to 1."""

    file: str
    truth: str
    predicted: str
    probability: float
    own: float


class Confused(Frozen):
    """`count` of the `images` of class `truth` were taken for `predicted`."""

    truth: str
    predicted: str
    count: int
    images: int


class ClassScore(Frozen):
    """A class's accuracy over its validation images, 0 to 1."""

    name: str
    images: int
    accuracy: float


class Mistakes(Frozen):
    """A model's answers to the validation images.

    `surest` are in falling order of probability; `confused` in falling order of count; `classes` the
    least accurate first, those without an image left out.
    """

    study: str
    model: str
    images: int
    top1: float
    mean_per_class: float
    surest: tuple[Mistake, ...]
    confused: tuple[Confused, ...]
    classes: tuple[ClassScore, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """The mistakes, and the crop that the model saw of each of the surest, as a WebP data URI."""

    mistakes: Mistakes
    pictures: tuple[str, ...]


def find_mistakes(
    study: str, place: Place, chosen: Chosen, *, device: str = "auto", most: int = 50,
    skip_unreadable: bool = False, progress: Progress | None = None, say: Say = silent,
) -> Found:  # fmt: skip
    """Asks the model about the study's validation images; the test images stay unseen.

    Raises UsageError for a model that was trained on the validation images, DataError for other data.
    """
    from caltech_hpo.training.device import resolve_device
    from caltech_hpo.training.trained import load_model, probabilities

    trained = chosen.model
    if trained.recipe.fit_on != "train":
        raise UsageError(
            f"this model ({chosen.words}) was trained on the validation images too: it knows them",
            f"run 'caltech-hpo final --study {study}' (--fit-on train), or give --model FILE",
        )
    index = searched_data(stored_study(place.storage, study), place, progress=progress, say=say)
    # With another split its training images may be among the validation images.
    if index.classes != trained.classes or index.fingerprint != trained.recipe.data.partition(WITHOUT)[0]:
        raise DataError(
            f"{index.root}: not what the model was trained on (other images, classes or split)",
            "give the folder that it was trained on: --data DIR",
        )
    data = load_search_data(
        index, trained.recipe.resize, place.cache, skip_unreadable=skip_unreadable, progress=progress
    )
    images = data.open_validation()
    names = list(named_images(index.validation, data.validation_cache))
    where = resolve_device(device)
    model, rows = load_model(trained, where), []
    # One view, as in the search: a test-time flip is another accuracy.
    recipe = trained.recipe.model_copy(update={"test_time_flip": False})
    for start in range(0, len(images), CHUNK):
        rows.append(probabilities(model, recipe, images.images[start : start + CHUNK], where).numpy())
        if progress:
            progress("asking the model", min(start + CHUNK, len(images)), len(images))
    shares = np.concatenate(rows)
    surest = surest_mistakes(shares, images.labels)[:most]
    pictures = tuple(picture(images.images[i], trained.recipe.crop) for i in surest)
    mistakes = summarize(study, chosen.words, trained.classes, names, images, shares, surest)
    return Found(mistakes, pictures)


def surest_mistakes(shares: NDArray[np.float32], labels: NDArray[np.int64]) -> list[int]:
    """Positions of the images taken for another class, the surest first; `shares` is (n, classes)."""
    predicted = shares.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    order = np.argsort(-shares[wrong, predicted[wrong]], kind="stable")
    return [int(i) for i in wrong[order]]


def summarize(
    study: str, model: str, classes: Sequence[str], names: Sequence[str], images: LabeledImages,
    shares: NDArray[np.float32], surest: Sequence[int],
) -> Mistakes:  # fmt: skip
    """The probabilities (n, classes) in records."""
    labels, predicted = images.labels, shares.argmax(1)
    matrix = confusion_matrix(labels, predicted, len(classes))
    sizes = matrix.sum(axis=1)
    off = matrix - np.diag(np.diag(matrix))
    wrong = [(int(t), int(p)) for t, p in zip(*np.nonzero(off), strict=True)]
    pairs = sorted(wrong, key=lambda pair: (-off[pair], pair))
    scores = [
        ClassScore(name=classes[i], images=int(sizes[i]), accuracy=float(matrix[i, i] / sizes[i]))
        for i in map(int, np.flatnonzero(sizes))
    ]
    return Mistakes(
        study=study, model=model, images=len(labels), top1=top1(matrix),
        mean_per_class=mean_per_class(matrix),
        surest=tuple(
            Mistake(
                file=names[i], truth=classes[labels[i]], predicted=classes[predicted[i]],
                probability=float(shares[i, predicted[i]]), own=float(shares[i, labels[i]]),
            )
            for i in surest
        ),
        confused=tuple(
            Confused(truth=classes[t], predicted=classes[p], count=int(off[t, p]), images=int(sizes[t]))
            for t, p in pairs
        ),
        classes=tuple(sorted(scores, key=lambda score: (score.accuracy, score.name))),
    )  # fmt: skip


def picture(pixels: Pixels, crop: int) -> str:
    """The centre crop, as the model saw it: a WebP data URI."""
    from PIL import Image

    top, left = (round((side - crop) / 2) for side in pixels.shape[:2])
    content = io.BytesIO()
    Image.fromarray(pixels[top : top + crop, left : left + crop]).save(
        content, "WEBP", quality=PICTURE_QUALITY
    )
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def write_mistakes(found: Found, path: Path) -> Path:
    """Writes the page: one HTML file that needs no network."""
    from caltech_hpo.results.model_files import write_text
    from caltech_hpo.results.page import environment

    path.parent.mkdir(parents=True, exist_ok=True)
    made = found.mistakes
    shown = list(zip(made.surest, found.pictures, strict=True))
    template = environment(path.parent, html=True).get_template("mistakes.html.j2")
    write_text(path, template.render(made=made, shown=shown, confused=made.confused[:40]))
    return path
