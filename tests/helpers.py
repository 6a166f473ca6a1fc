"""What several tests need: image files and searched studies, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, *, size=(48, 40), mode="RGB", hue=None) -> Path:
    """A noisy image; `hue` 0, 1 or 2 makes that channel bright, so that classes can be told apart."""
    noise = np.random.default_rng(seed).integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
    if hue is not None:
        noise[..., hue] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def write_folders(root: Path, *, classes=("ant", "Bee", "cat"), images=9, size=(48, 40)) -> Path:
    """Class folders of PNG images that are easy to tell apart."""
    for label, name in enumerate(classes):
        for number in range(images):
            write_image(
                root / name / f"image_{number:03d}.png", seed=1000 * label + number, size=size, hue=label % 3
            )
    return root


def write_study(url: str, trials, *, data="x", name="demo", seed=0):
    """A searched demo study. Each trial is its validation accuracies over epochs and its parameters.

    A trial may have a third part: the changes to its recipe.
    """
    import optuna

    from caltech_hpo.search.records import EPOCH_KEY, RECIPE_KEY
    from caltech_hpo.search.space import Binding, recipe_for
    from caltech_hpo.search.storage import open_storage, open_study
    from caltech_hpo.spec import EpochResult
    from caltech_hpo.study_files import load_study

    spec = load_study("demo")
    study = open_study(open_storage(url), name, spec, data, sampler_seed=0, allow_changed=True)
    binding = Binding(classes=3, data=data, seed=seed, precision="fp32")
    for accuracies, params, *changes in trials:
        recipe = recipe_for(spec, params, binding).model_copy(update=dict(*changes))
        epochs = [
            EpochResult(
                epoch=number, learning_rate=0.1, training_loss=1.0, validation_loss=1.0,
                validation_top1=accuracy, images=9, seconds=1.0,
            )
            for number, accuracy in enumerate(accuracies, start=1)
        ]  # fmt: skip
        system = {f"{EPOCH_KEY}{epoch.epoch}": epoch.model_dump(mode="json") for epoch in epochs}
        system |= {RECIPE_KEY: recipe.model_dump(mode="json"), "fixed_params": params}
        study.add_trial(optuna.trial.create_trial(value=max(accuracies), system_attrs=system))
    return study


def record_all(url: str, rows) -> None:
    """Records test scores; here, where a spawned process can import it."""
    from caltech_hpo.results.ledger import record

    for row in rows:
        record(url, row)


def eager_worker(connection, config) -> None:
    """A worker that saves a checkpoint after every epoch; here, where a spawned process can import it."""
    from caltech_hpo.search import worker

    worker.CHECKPOINT_EVERY = 0.0
    worker.worker_main(connection, config)


def talkative_worker(connection, config) -> None:
    """A worker that says after every batch where it is; here, where a spawned process can import it."""
    from caltech_hpo.search import underway, worker

    underway.TELL_EVERY = 0.0
    worker.worker_main(connection, config)


def gated_worker(connection, folder) -> None:
    """Makes epochs up, without torch; all but the first two of them are ready once `folder/go` is there."""
    import itertools
    import os
    import time

    from caltech_hpo.search.messages import EpochDone, Finished, Ready
    from caltech_hpo.spec import EpochResult

    begun = len(list(folder.glob("begun-*")))
    (folder / f"begun-{os.getpid()}").touch()
    while begun >= 2 and not (folder / "go").exists():
        time.sleep(0.01)
    connection.send(Ready("cpu", "fp32", {}))
    while (job := connection.recv()) is not None:
        for number in itertools.count(1):
            result = EpochResult(
                epoch=number, learning_rate=0.1, training_loss=1.0, validation_loss=1.0, validation_top1=0.5,
                images=9, seconds=0.1,
            )  # fmt: skip
            connection.send(EpochDone(job.number, result))
            if not connection.recv():
                break
        connection.send(Finished(job.number))


def writing_worker(connection, config) -> None:
    """Makes epochs up and writes its files, without torch: what has been trained is in the checkpoint."""
    from caltech_hpo.search.messages import EpochDone, Finished, Ready
    from caltech_hpo.spec import EpochResult

    assert config.data.training_cache.exists() and config.data.validation_cache.exists()
    connection.send(Ready("cpu", "fp32", {}))
    while (job := connection.recv()) is not None:
        job.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        begun = int(job.checkpoint.read_text()) if job.checkpoint.exists() else 0
        for number in range(job.known + 1, job.recipe.epochs + 1):
            result = EpochResult(
                epoch=number, learning_rate=0.1, training_loss=1.0, validation_loss=1.0,
                validation_top1=begun / 10, images=9, seconds=0.1,
            )  # fmt: skip
            job.checkpoint.write_text(str(number))
            if number == job.recipe.epochs:
                job.keep.write_text("weights")
            connection.send(EpochDone(job.number, result))
            connection.recv()
        connection.send(Finished(job.number))
