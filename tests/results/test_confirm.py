"""`confirm`: who is a finalist, on which seeds, how they are ranked, and what an interruption leaves."""

from __future__ import annotations

import math

import optuna
import pytest
from helpers import write_folders, write_study
from scipy import stats

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.errors import CaltechHpoError, DataError, StorageError, UsageError
from caltech_hpo.results import confirm
from caltech_hpo.results.confirm import (
    TrainingEnded,
    TrainingStarted,
    TrainingUnderway,
    confirmed,
    fresh_seeds,
    open_confirm,
    run_confirm,
)
from caltech_hpo.results.plan import choose_trial, plan_finals
from caltech_hpo.results.ranking import Candidate, candidates, rank
from caltech_hpo.results.runs_table import add_request, runs
from caltech_hpo.results.trainings import seeded
from caltech_hpo.search.locks import search_lock
from caltech_hpo.search.messages import Died, EpochDone, EpochPart, Failed, Finished, Ready, Underway
from caltech_hpo.search.records import trial_record, trial_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import open_storage
from caltech_hpo.search.urls import default_url
from caltech_hpo.spec import EpochResult, Recipe
from caltech_hpo.study_files import load_study

PARAMS = {"learning_rate": 0.01, "batch_size": 32, "epochs": 2, "augmentation": "center_crop"}


def params(rate):
    return PARAMS | {"learning_rate": rate}


def candidate(trial, value):
    return Candidate(trial=trial, configuration=f"c{trial}", params={}, value=value)


def ranked(asked, values, seeds=(1, 2, 3)):
    pairs = {(f"c{trial}", seed): value for trial, run in values.items() for seed, value in run.items()}
    return rank("s", asked, seeds, pairs, {})


def test_the_ranking_is_by_mean_with_paired_differences():
    lucky, steady = candidate(4, 0.95), candidate(7, 0.90)
    values = {4: {1: 0.70, 2: 0.90, 3: 0.80}, 7: {1: 0.75, 2: 0.94, 3: 0.83}}
    made = ranked([lucky, steady], values)
    first, second = made.finalists
    assert (first.trial, made.winner.trial, second.trial, made.search_best) == (7, 7, 4, 4)
    a, b = list(values[7].values()), list(values[4].values())
    found = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert second.behind_ci95 == pytest.approx((found.low, found.high))
    assert second.behind == pytest.approx(0.04) and (first.behind, first.behind_ci95) == (0, None)
    assert second.mean == pytest.approx(0.8) and second.sd == pytest.approx(0.1)
    wide = stats.ttest_1samp(b, 0).confidence_interval(0.95)
    assert second.ci95 == pytest.approx((wide.low, 1.0)) and wide.high > 1
    assert second.ci95[0] < 0.7 < found.low + 0.7 < 0.8  # pairing takes the seeds' own spread out
    assert made.optimism == pytest.approx(0.15) and first.optimism == pytest.approx(0.90 - 0.84)


@pytest.mark.parametrize(
    ("values", "seeds", "order"),
    [
        ({0: {1: 0.5}, 1: {1: 0.6}}, (1,), [1, 0]),
        ({0: {1: 0.5, 2: 0.9}, 1: {1: 0.6}}, (1,), [1, 0]),  # seed 2 is not whole
        ({0: {1: 0.5}, 1: {1: 0.5}}, (1,), [0, 1]),  # equal means: the higher search value first
        ({0: {1: 0.5}, 1: {2: 0.6}}, None, None),
        ({0: {1: 0.5, 9: 0.1}, 1: {1: 0.6, 9: 0.9}}, (1,), [1, 0]),  # seed 9 was not asked for
        ({}, None, None),
    ],
)
def test_only_whole_seeds_count(values, seeds, order):
    made = ranked([candidate(0, 0.8), candidate(1, 0.7)], values)
    if seeds is None:
        assert made is None
        return
    assert made.seeds == seeds and made.asked_seeds == 3
    assert [one.trial for one in made.finalists] == order
    assert all(one.sd is None and one.ci95 is None and one.behind_ci95 is None for one in made.finalists)


def test_finalists_are_the_best_distinct_configurations(tmp_path):
    trials = [
        ([0.5], params(0.01)),
        ([0.8], params(0.02)),
        ([0.9], params(0.02), {"seed": 5}),
        ([0.7], params(0.03)),
        ([0.8], params(0.04)),
    ]
    records = trial_records(write_study(default_url(tmp_path), trials))
    assert [one.trial for one in candidates(records, 3)] == [2, 4, 3]
    assert [one.trial for one in candidates(records, 9)] == [2, 4, 3, 0]
    pruned = [record.model_copy(update={"state": "pruned"}) for record in records[:3]]
    assert [one.trial for one in candidates([*pruned, *records[3:]], 9)] == [4, 3]
    assert fresh_seeds(records, 3) == (6, 7, 8)  # no trial was searched with one of them
    last = records[0].recipe.model_copy(update={"seed": 2**32 - 1})
    assert fresh_seeds([records[0].model_copy(update={"recipe": last})], 2) == (0, 1)


def epoch(number, accuracy, loss=1.0):
    return EpochResult(
        epoch=number, learning_rate=0.1, training_loss=loss, validation_loss=1.0,
        validation_top1=accuracy, images=10, seconds=1.5,
    )  # fmt: skip


def steady(job):
    """An accuracy that tells the recipe: ten times the learning rate, a hundredth a seed."""
    for number in range(1, job.recipe.epochs + 1):
        value = 10 * job.recipe.learning_rate + job.recipe.seed / 100
        yield EpochDone(job.number, epoch(number, value if number == 1 else value / 2))
    yield Finished(job.number)


class Scripted:
    """An executor whose workers play a script, one event of each in turn."""

    def __init__(self, script=steady):
        self.script, self.jobs, self.workers, self.events, self.stopped = script, [], 1, {}, set()
        self.ready = Ready("cpu", "fp32", {})

    def __call__(
        self, recipe, data, *, device, workers=1, share=1, features=None, memory=None, progress=None
    ):  # fmt: skip
        self.workers, self.events = workers, {}
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @property
    def free(self):
        return self.workers - len(self.events)

    def submit(self, job):
        assert self.free > 0
        self.jobs.append(job)
        self.events[job.number] = self.script(job)

    def next_event(self):
        number = next(iter(self.events))
        script = self.events.pop(number)
        event = Finished(number) if number in self.stopped else next(script)
        if isinstance(event, EpochDone | Underway):
            self.events[number] = script
        return event

    def answer(self, job, go_on):
        if not go_on:
            self.stopped.add(job)


@pytest.fixture
def place(tmp_path):
    """Trials 0, 1, 2 with search values 0.9, 0.8, 0.7; confirmed, they end the other way round."""
    images = write_folders(tmp_path / "images")
    made = Place(tmp_path / "home", default_url(tmp_path / "home"), data=images)
    trials = [([0.9], params(0.01)), ([0.8], params(0.02)), ([0.7], params(0.03))]
    write_study(made.storage, trials, data=scan(images).fingerprint)
    return made


def go(place, monkeypatch, *, script=steady, finalists=2, seeds=2, workers=1, most=10**6):
    """Runs a confirm on made-up trainings; stops it after `most` events. Returns the jobs and events."""
    executor = Scripted(script)
    monkeypatch.setattr(confirm, "open_executor", executor)
    events = []
    with open_confirm("demo", place, finalists=finalists, seeds=seeds) as plan:
        for event in run_confirm(plan, workers=workers):
            events.append(event)
            if len(events) == most:
                break
    return executor.jobs, events


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_finalists_run_seed_by_seed_and_once(place, monkeypatch, workers):
    jobs, events = go(place, monkeypatch, workers=workers)
    order = [(job.recipe.learning_rate, job.recipe.seed) for job in jobs]
    assert order == [(0.01, 1), (0.02, 1), (0.01, 2), (0.02, 2)]
    assert len({job.number for job in jobs}) == 4 and all(job.keep is None for job in jobs)
    assert sum(isinstance(event, TrainingStarted) for event in events) == 4
    made = confirmed(place.storage, "demo")
    assert made.seeds == (1, 2) and [one.trial for one in made.finalists] == [1, 0]
    assert made.winner.values == pytest.approx((0.21, 0.22))
    assert made.optimism == pytest.approx(0.9 - 0.115)
    (run, *_) = runs(open_storage(place.storage), "demo")
    assert (run.best_epoch, run.epochs_run, run.seconds, run.stop_reason) == (1, 2, 3.0, "finished")
    assert go(place, monkeypatch)[0] == []  # the same command again trains nothing


def test_what_is_left_out_is_said(place, monkeypatch):
    lost = scan(place.data).training[0].path
    (place.data / lost).write_bytes(b"no image")
    index = scan(place.data)
    resize = load_study("demo").recipe.resize
    data = load_search_data(index, resize, place.cache, skip_unreadable=True)
    trials = [([0.9], params(0.01), {"data": data.fingerprint})]
    write_study(place.storage, trials, name="demo@2", data=index.fingerprint)
    monkeypatch.setattr(confirm, "open_executor", Scripted(steady))
    told = []
    with open_confirm("demo@2", place, finalists=1, seeds=1) as plan:
        list(run_confirm(plan, skip_unreadable=True, say=told.append))
    assert told == [f"left out, since unreadable: 1 image(s) (training: {lost})"]


def test_who_searches_the_study_meanwhile_is_told(place):
    told = []
    with search_lock(place.storage, place.home, "demo"), open_confirm(
        "demo", place, finalists=1, seeds=1, say=told.append
    ):  # fmt: skip
        assert len(told) == 1 and "study demo is being searched (" in told[0] and "process" in told[0]


def test_where_a_training_is_is_told(place, monkeypatch):
    def script(job):
        yield Underway(job.number, EpochPart(1, 5, 10))
        yield from steady(job)

    _, events = go(place, monkeypatch, script=script, finalists=1, seeds=1)
    told = [event for event in events if isinstance(event, TrainingUnderway)]
    assert told == [TrainingUnderway(events[0].training, EpochPart(1, 5, 10))]


def test_an_interrupted_confirm_goes_on_and_what_it_left_is_paired(place, monkeypatch):
    ended = 0
    for most in (8, 12):  # 4 events a training: after two trainings, then after three more
        _, events = go(place, monkeypatch, finalists=3, seeds=2, most=most)
        ended += sum(isinstance(event, TrainingEnded) for event in events)
        if most == 8:
            assert ended == 2 and confirmed(place.storage, "demo") is None  # no seed has all three
    made = confirmed(place.storage, "demo")
    assert ended == 5 and made.seeds == (1,) and made.asked_seeds == 2
    words = []
    plan_finals("demo", place, say=words.append)
    assert any("interrupted: 1 of 2 seeds" in text for text in words)
    jobs, _ = go(place, monkeypatch, finalists=3, seeds=2)
    assert [(job.recipe.learning_rate, job.recipe.seed) for job in jobs] == [(0.03, 2)]
    assert confirmed(place.storage, "demo").seeds == (1, 2)


def test_more_finalists_and_seeds_use_what_is_there(place, monkeypatch):
    go(place, monkeypatch, finalists=2, seeds=1)
    jobs, _ = go(place, monkeypatch, finalists=3, seeds=2)
    assert len(jobs) == 4
    assert [one.trial for one in confirmed(place.storage, "demo").finalists] == [2, 1, 0]
    assert go(place, monkeypatch, finalists=2, seeds=1)[0] == []
    made = confirmed(place.storage, "demo")
    assert [one.trial for one in made.finalists] == [2, 1, 0]  # evidence does not shrink
    assert made.seeds == (1, 2)
    add_request(open_storage(place.storage), "demo", [candidate(9, 0.9)], (1,))
    assert confirmed(place.storage, "demo") == made  # until it has a whole seed, the one before stands


def test_a_configuration_that_was_searched_twice_is_one_finalist(place, monkeypatch):
    go(place, monkeypatch)
    write_study(place.storage, [([0.95], params(0.01))], data=scan(place.data).fingerprint)
    jobs, _ = go(place, monkeypatch, finalists=1, seeds=3)
    assert sorted((job.recipe.learning_rate, job.recipe.seed) for job in jobs) == [(0.01, 3), (0.02, 3)]
    assert [one.trial for one in confirmed(place.storage, "demo").finalists] == [1, 3]


def test_a_later_best_trial_competes_with_who_was_confirmed_before(place, monkeypatch):
    go(place, monkeypatch)
    write_study(place.storage, [([0.95], params(0.005))], data=scan(place.data).fingerprint)
    jobs, events = go(place, monkeypatch, finalists=1, seeds=3)
    asked = {(job.recipe.learning_rate, job.recipe.seed) for job in jobs}
    assert asked == {(0.005, 1), (0.005, 2), (0.005, 3), (0.01, 3), (0.02, 3)}
    assert not any(event.resumed for event in events if isinstance(event, TrainingStarted))
    made = confirmed(place.storage, "demo")
    assert made.winner.trial == 1 and {one.trial for one in made.finalists} == {0, 1, 3}
    assert made.seeds == (1, 2, 3)


def test_a_training_that_diverges_is_stopped_and_counts(place, monkeypatch):
    def script(job):
        if job.recipe.learning_rate == 0.02 and job.recipe.seed == 2:
            yield EpochDone(job.number, epoch(1, 0.05, math.nan))
            raise AssertionError("went on")
        yield from steady(job)

    go(place, monkeypatch, script=script)
    marked = [run for run in runs(open_storage(place.storage), "demo") if run.stop_reason != "finished"]
    assert [(run.trial, run.seed, run.value, run.epochs_run) for run in marked] == [(1, 2, 0.05, 1)]
    assert marked[0].stop_reason.startswith("diverged")
    found = {one.trial: (one.diverged, one.values) for one in confirmed(place.storage, "demo").finalists}
    assert found[1] == (1, pytest.approx((0.21, 0.05))) and found[0][0] == 0


@pytest.mark.parametrize(
    ("event", "words"),
    [(Failed(1, "out of memory", "20 GiB"), "20 GiB\n  fix: use fewer"), (Died(1, -9), "exit code -9")],
)
def test_a_training_that_fails_ends_the_command_and_leaves_the_others(place, monkeypatch, event, words):
    def script(job):
        yield from [event] if job.number == 1 else steady(job)

    with pytest.raises(CaltechHpoError, match=words):
        go(place, monkeypatch, script=script)
    assert [(run.trial, run.seed) for run in runs(open_storage(place.storage), "demo")] == [(0, 1)]


def test_a_worker_that_was_killed_is_told(place, monkeypatch):
    killed = []

    def script(job):
        if not killed:
            killed.append(job.number)
            yield Died(job.number, -9)
        yield from steady(job)

    _, events = go(place, monkeypatch, script=script, finalists=1, seeds=1)
    begun = [(event.resumed, event.lost) for event in events if isinstance(event, TrainingStarted)]
    assert begun == [(False, False), (False, True)] and isinstance(events[-1], TrainingEnded)


def test_final_takes_the_confirmed_winner(place, monkeypatch):
    records = trial_records(write_study(place.storage, [], data=scan(place.data).fingerprint))
    assert choose_trial("demo", records, None, confirmed(place.storage, "demo"))[0].number == 0
    go(place, monkeypatch)
    made = confirmed(place.storage, "demo")
    record, why = choose_trial("demo", records, None, made)
    assert (record.number, why) == (1, "confirmed over 2 seeds")
    assert choose_trial("demo", records, 0, made)[0].number == 0
    foreign = made.winner.model_copy(update={"configuration": "of another study"})
    other = made.model_copy(update={"finalists": (foreign,)})
    assert choose_trial("demo", records, None, other)[0].number == 0
    write_study(place.storage, [([0.95], params(0.05))], data=scan(place.data).fingerprint)
    words = []
    (plan,) = plan_finals("demo", place, say=words.append)
    assert plan.record.number == 1 and "trial 3 is the search's best, but was not confirmed" in words[0]


def test_one_confirm_of_a_study_at_a_time(place):
    with (
        open_confirm("demo", place, finalists=2, seeds=1),
        pytest.raises(StorageError, match="another confirm of study 'demo'"),
        open_confirm("demo", place, finalists=2, seeds=1),
    ):
        pass


def test_what_is_refused_before_any_training(place, tmp_path):
    with pytest.raises(DataError, match="not the data"):
        other = Place(place.home, place.storage, data=write_folders(tmp_path / "other", images=12))
        open_confirm("demo", other, finalists=1, seeds=1).__enter__()
    write_study(place.storage, [], name="demo@2")
    with pytest.raises(UsageError, match="no complete trial"):
        open_confirm("demo@2", place, finalists=1, seeds=1).__enter__()


def test_reading_creates_nothing(place, tmp_path):
    file = tmp_path / "home" / "studies.db"
    before = file.read_bytes()
    assert confirmed(place.storage, "demo") is None and confirmed(place.storage, "absent") is None
    assert file.read_bytes() == before
    assert confirmed(default_url(tmp_path / "nothing"), "demo") is None
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("searched", "earlier", "count", "seeds"),
    [
        ((0,), (), 3, (1, 2, 3)),
        ((0, 7), (), 2, (8, 9)),
        ((0, 7), (1, 2), 3, (1, 2, 8)),  # a later search with --seed 7 does not start the confirm anew
        ((0, 2), (1, 2, 3), 3, (1, 3, 4)),
        ((2**32 - 1,), (), 2, (0, 1)),
    ],
)
def test_seeds_are_fresh_and_stay(searched, earlier, count, seeds):
    recipe = Recipe(architecture="resnet18", classes=3, data="x")
    blank = trial_record(optuna.trial.create_trial(value=0.5))
    records = [blank.model_copy(update={"recipe": seeded(recipe, seed)}) for seed in searched]
    assert fresh_seeds(records, count, earlier) == seeds
