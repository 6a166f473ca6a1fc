"""The library does what the commands do, on images that the test makes."""

from __future__ import annotations

import inspect

import pytest
from helpers import write_folders, write_image

import caltech_hpo
from caltech_hpo.errors import CaltechHpoError, UsageError
from caltech_hpo.search.events import TrialEnded, TrialEpoch

STUDY = """
data = "folder"
[recipe]
architecture = "resnet18"
resize = 36
crop = 32
batch_size = 8
[space]
learning_rate = { low = 0.005, high = 0.02, log = true }
epochs = { choices = [3, 4] }
"""


def test_from_a_study_file_to_a_prediction(tmp_path):
    (tmp_path / "mine.toml").write_text(STUDY)
    images = write_folders(tmp_path / "images", images=18)
    spec = caltech_hpo.load_study(tmp_path / "mine.toml")
    place = {"home": tmp_path / "home"}
    events = []
    done = caltech_hpo.search(spec, trials=2, data=images, device="cpu", on_event=events.append, **place)
    assert done.study == "mine" and len(done.trials) == 2 and done.best in done.trials
    assert sum(isinstance(event, TrialEnded) for event in events) == 2
    assert sum(isinstance(event, TrialEpoch) for event in events) == sum(len(t.epochs) for t in done.trials)
    again = caltech_hpo.search(spec, trials=2, data=images, **place)  # nothing is left to do
    assert again == done
    (shown,) = caltech_hpo.predict(
        write_image(tmp_path / "new.png", 9, hue=1), spec, top=3, device="cpu", **place
    )
    assert sorted(shown.classes) == ["Bee", "ant", "cat"]
    epochs = []
    (score,) = caltech_hpo.final(spec, data=images, device="cpu", on_epoch=epochs.append, **place)
    assert score.val_accuracy == done.best.value and len(epochs) == done.best.recipe.epochs
    assert caltech_hpo.final(spec, data=images, **place) == [score]
    late = caltech_hpo.search(spec, trials=3, data=images, device="cpu", timeout_minutes=1e-9, **place)
    assert late == done  # no trial began
    with pytest.raises(CaltechHpoError, match=r"need about .*, and 10 MiB may be used"):
        caltech_hpo.search(spec, trials=3, data=images, device="cpu", memory_gib=0.01, **place)


def test_names_and_mistakes(tmp_path):
    assert caltech_hpo.load_study("alexnet-scratch").name == "alexnet-scratch"
    with pytest.raises(UsageError, match="did you mean 'demo'"):
        caltech_hpo.search("dem", trials=1, home=tmp_path)
    with pytest.raises(UsageError):
        caltech_hpo.confirm("demo", home=tmp_path)
    assert caltech_hpo.load_study("demo@2").name == "demo@2"  # which has trials and scores of its own
    for wrong in ({"workers": 0}, {"trials": 0}, {"memory_gib": -1}, {"timeout_minutes": float("nan")}):
        ((name, value),) = wrong.items()
        with pytest.raises(UsageError, match=f"{name}: {value}"):
            caltech_hpo.search("demo", **{"trials": 1, "home": tmp_path, **wrong})
    with pytest.raises(UsageError, match="seeds: 0"):
        caltech_hpo.final("demo", seeds=0, home=tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        caltech_hpo.tune  # noqa: B018
    assert "memory_gib" in inspect.signature(caltech_hpo.search).parameters
    assert callable(caltech_hpo.search) and caltech_hpo.search.run.open_search  # the room of the same name
