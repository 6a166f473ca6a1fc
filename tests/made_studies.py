"""Searches with made-up curves, run by the supervisor into a real SQLite database."""

from __future__ import annotations

import math

from caltech_hpo.search.messages import EpochDone, Finished, Ready
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.space import Binding
from caltech_hpo.search.storage import open_storage, open_study
from caltech_hpo.search.supervisor import Supervisor
from caltech_hpo.search.urls import default_url
from caltech_hpo.search.write_through import hold
from caltech_hpo.spec import EpochResult
from caltech_hpo.study_files import load_study


class Curves:
    """An executor whose one worker plays a made-up curve for each trial."""

    free = 1
    ready = Ready("cpu", "fp32", {"torch": "0"})

    def __init__(self, accuracies, diverging=()):
        self.accuracies, self.diverging, self.stopped = accuracies, diverging, False

    def submit(self, job):
        self.free, self.stopped = 0, False
        self.events = self.play(job)

    def play(self, job):
        for number in range(1, job.recipe.epochs + 1):
            late = number == 3 and job.number in self.diverging
            yield EpochDone(
                job.number,
                EpochResult(
                    epoch=number, learning_rate=0.1, training_loss=math.nan if late else 1.0,
                    validation_loss=1.0, validation_top1=self.accuracies(job.number, number), images=10,
                    seconds=2.0,
                ),
            )  # fmt: skip
        yield Finished(job.number)

    def event_within(self, seconds):
        return True

    def next_event(self, seconds=None):
        event = next(e for e in self.events if not self.stopped or isinstance(e, Finished))
        self.free = int(isinstance(event, Finished))
        return event

    def answer(self, job, go_on):
        self.stopped = not go_on


def searched(home, accuracies, *, name="demo", trials=8, diverging=(), pruning=True, url=None, **changes):
    """The study `name` in the database of `home` (or at `url`); returns its spec and records.

    `accuracies(trial, epoch)` is the validation accuracy; `changes` replace fields of the study's spec.
    """
    spec = load_study(name).model_copy(update=changes)
    storage = open_storage(url or default_url(home))
    study = open_study(storage, name, spec, "x", sampler_seed=0, allow_changed=False)
    binding = Binding(classes=10, data="x", seed=0, precision="fp32")
    curves = Curves(accuracies, diverging)
    list(Supervisor(*hold(study, storage), spec, curves, binding, pruning=pruning).run(trials))
    return spec, trial_records(study)
