"""Every hand-tuned row that needs ImageNet weights runs, on weights that the test makes.

They lie where torchvision puts the files that it fetches, in its layout: what a user without a network
does by hand.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import write_folders
from torchvision import models

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.search.inline import InlineExecutor
from caltech_hpo.search.messages import EpochDone, Finished, Job, WorkerConfig, Working
from caltech_hpo.search.space import Binding, recipe_for
from caltech_hpo.study_files import complete_params, load_study
from caltech_hpo.training.weights import imagenet_file

# Enough to train a row; at its own 224 pixels a VGG16 takes minutes.
SMALL = {"epochs": 1, "resize": 72, "crop": 64}
STUDIES = {
    "alexnet": ["alexnet-transfer", "alexnet-freeze", "alexnet-augment"],
    "resnet18": ["resnet18-transfer"],
    "vgg16": ["vgg16-transfer"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return load_search_data(scan(write_folders(folder / "images")), 72, folder / "cache")


def filled(parameter):
    """Small numbers in a parameter's shape, ones for what a batch norm divides by."""
    if parameter.dim() < 2:
        return torch.ones(parameter.shape, dtype=parameter.dtype)
    return torch.empty(parameter.shape).uniform_(-0.01, 0.01)


@pytest.fixture(scope="module", params=STUDIES)
def architecture(request, tmp_path_factory):
    """An architecture whose weights are in torchvision's cache; they are deleted afterwards."""
    hub = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.hub, "_hub_dir", str(hub))
        path, _ = imagenet_file(request.param)
        path.parent.mkdir(parents=True)
        with torch.device("meta"):  # what its initialisation draws is not wanted
            model = models.get_model(request.param, weights=None)
        torch.save({name: filled(value) for name, value in model.state_dict().items()}, path)
        yield request.param
        path.unlink()


def test_every_row_trains(architecture, data, tmp_path):
    for name in STUDIES[architecture]:
        spec = load_study(name)
        assert spec.recipe.weights == "imagenet" and spec.baselines
        executor = InlineExecutor(WorkerConfig(data, "cpu", None, spec.recipe, tmp_path / "features"))
        binding = Binding(classes=3, data=data.fingerprint, seed=0, precision=executor.ready.precision)
        # Rows that differ only in numbers train alike: one of each freeze mode and augmentation is enough.
        kinds = {(row.params.get("freeze"), row.params.get("augmentation")): row for row in spec.baselines}
        for number, row in enumerate(kinds.values()):
            recipe = recipe_for(spec, complete_params(spec, row.params), binding)
            executor.submit(Job(number, recipe.model_copy(update=SMALL)))
            events = []
            while not events or not isinstance(events[-1], Finished):
                events.append(executor.next_event())
                if isinstance(events[-1], EpochDone):
                    executor.answer(number, True)
            (epoch,) = [event.result for event in events if isinstance(event, EpochDone)]
            assert math.isfinite(epoch.training_loss) and epoch.images == 9, row.name
            kept = any(isinstance(event, Working) for event in events)
            assert kept == (recipe.freeze == "features"), row.name  # the frozen part is computed once
        executor.close()
