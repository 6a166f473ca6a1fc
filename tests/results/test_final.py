"""`final`: which trial, which seeds, what is refused, and that no score is lost or taken twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import optuna
import pytest
import torch
from commands import answer, here
from helpers import write_folders, write_study
from PIL import Image
from scipy import stats

from caltech_hpo.data.dataset import scan
from caltech_hpo.errors import CaltechHpoError, DataError, StorageError, UsageError
from caltech_hpo.results import final, ledger, retraining
from caltech_hpo.results.final import final_lock, is_settled
from caltech_hpo.results.library import final as library_final
from caltech_hpo.results.overview import make_overview
from caltech_hpo.results.plan import plan_finals
from caltech_hpo.results.predict import find_model
from caltech_hpo.results.report import make_report
from caltech_hpo.results.retraining import (
    RetrainingEpoch,
    RetrainingPlanned,
    RetrainingStarted,
    Scored,
    ScoringStarted,
    run_finals,
)
from caltech_hpo.results.scores import mean_accuracy, mean_interval
from caltech_hpo.results.seeds import over_seeds
from caltech_hpo.results.trainings import SEEDS, Trained, seeded, train_each, training_failure
from caltech_hpo.search.inline import InlineExecutor
from caltech_hpo.search.messages import Died, Failed, WorkerBugError, WorkerConfig
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.urls import default_url

SHORT = {"learning_rate": 0.01, "batch_size": 32, "epochs": 2, "augmentation": "center_crop"}
OTHER = SHORT | {"learning_rate": 0.02}


@pytest.mark.parametrize(
    ("event", "kind", "words"),
    [
        (Failed(0, "bug", "Traceback ..."), WorkerBugError, "Traceback"),
        (Failed(0, "out of memory", "20 GiB"), CaltechHpoError, "out of memory: 20 GiB"),
        (Died(0, -9), CaltechHpoError, "exit code -9"),
    ],
)
def test_a_bug_keeps_its_traceback_and_the_rest_gets_one_line(event, kind, words):
    error = training_failure(event)
    assert type(error) is kind and words in str(error)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A study on a small image folder: trial 0 is the best, trial 1 another, trial 2 as 0 on another seed."""
    images = write_folders(tmp_path / "images", images=12)
    made = Place(tmp_path / "home", default_url(tmp_path / "home"), data=images)
    trials = [([0.1, 0.9], SHORT), ([0.2, 0.8], OTHER), ([0.1, 0.7], SHORT, {"seed": 9})]
    write_study(made.storage, trials, data=scan(images).fingerprint)

    class Inline(InlineExecutor):
        """Trains in this process: seconds instead of tens of them."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.close()

    def inline(recipe, data, *, device, workers, share, features, memory, progress):
        return Inline(WorkerConfig(data, device, 1, recipe, features))

    monkeypatch.setattr(retraining, "open_executor", inline)
    return made


def take(plan, how=None, **options):
    """What the command does for one plan."""
    *_, last = run_finals([plan], device="cpu", **options)
    assert isinstance(last, Scored) and last.plan.recipe == plan.recipe and how in (None, last.how)
    return last.result


def test_a_score_is_taken_once_and_kept_with_what_it_belongs_to(place):
    (plan,) = plan_finals("demo", place)
    first = take(plan)
    (row,) = ledger.scores(place.storage, "demo")
    recipe = plan.recipe
    assert (row.trial, row.recipe_hash, row.configuration) == (0, recipe.hash, recipe.configuration)
    assert (row.seed, row.fit_on, row.reason, row.result) == (0, "train", "", first)
    assert (row.top1, row.test_images) == (first.test_accuracy, 12)
    assert row.test_list == ledger.list_hash(scan(place.data).test)
    assert row.taken_at.endswith("+00:00") and row.version
    metrics = json.loads((plan.folder / "metrics.json").read_text())
    assert metrics["leaks"] == []
    assert metrics["result"]["test_accuracy"] == row.top1 and (plan.folder / "confusion.png").is_file()

    again = plan_finals("demo", Place(place.home, place.storage, data=place.home / "absent"))
    assert [plan.stored for plan in again] == [first] and take(again[0]) == first


@pytest.fixture
def leaky(place):
    """A study on the same folder, where the pixels of a test image are in training and validation too."""
    index = scan(place.data)
    for target in (index.training[0], index.validation[1]):
        with Image.open(place.data / index.test[0].path) as image:
            image.save(place.data / target.path, compress_level=1)
    write_study(place.storage, [([0.1, 0.9], SHORT)], name="demo@2", data=scan(place.data).fingerprint)
    names = [f"{split}: {getattr(index, split)[i].path}" for split, i in (("training", 0), ("validation", 1))]
    return place, [*names, f"test: {index.test[0].path}"]


def test_a_test_image_that_was_trained_on_is_refused_before_the_training(leaky, monkeypatch):
    place, names = leaky
    (plan,) = plan_finals("demo@2", place)
    monkeypatch.setattr(retraining, "open_executor", None)  # nothing is trained
    with pytest.raises(DataError) as refused:
        take(plan)
    message = str(refused.value)
    assert "study 'demo@2': 1 test image(s) are" in message and " = ".join(names) in message
    assert "remove one of each" in message and "--allow-leak" in message
    assert ledger.scores(place.storage) == []


def test_a_leak_that_is_allowed_is_told_and_noted(leaky):
    place, names = leaky
    (plan,) = plan_finals("demo@2", place)
    told = []
    result = take(plan, allow_leak=True, say=told.append)
    assert len(told) == 1 and "1 test image(s) are" in told[0] and " = ".join(names) in told[0]
    metrics = json.loads((plan.folder / "metrics.json").read_text())
    assert metrics["leaks"] == [names] and (result.test_images, result.leaks) == (12, 1)
    words = "1 of the test images are training or validation images too"
    for command in ("final", "report"):
        shown = here(command, "--study", "demo@2", "--home", place.home, cwd=place.home)
        assert words in " ".join(shown.stdout.split())
    here("report", "--all", "--home", place.home, cwd=place.home)
    (page,) = place.home.rglob("report.md")
    assert ", 1 of the images are training or validation images too" in page.read_text()
    # The stored score needs neither the images nor the option.
    (again,) = plan_finals("demo@2", Place(place.home, place.storage, data=place.home / "absent"))
    assert take(again) == result


def test_another_configuration_needs_a_reason(place):
    take(plan_finals("demo", place)[0])
    for options in ({"trial": 1}, {"fit_on": "train+val"}, {"trial": 1, "seeds": 3}):
        with pytest.raises(UsageError) as refused:
            plan_finals("demo", place, **options)
        for words in ("trial 0", "fitted on train", "top-1 ", "+00:00", '--again "reason"'):
            assert words in str(refused.value)
    with pytest.raises(UsageError, match="reason is empty"):
        plan_finals("demo", place, trial=1, again="  ")
    plan_finals("demo", place, trial=2)  # the same configuration on another seed needs none
    take(plan_finals("demo", place, trial=1, again="a reviewer asked")[0])
    plan_finals("demo", place, trial=1, seeds=2)  # and none is needed to go on with it
    made = make_report("demo", place)
    assert (made.test_uses, made.test_reasons) == (2, ("a reviewer asked",))
    # trial 2 is trial 0's configuration on another seed, and the test accuracy is the configuration's
    assert all(row.test_accuracy is not None for row in made.rows if row.trial in (0, 1, 2))


def test_a_repetition_of_the_study_counts_as_the_study(place):
    """NAME@2 would otherwise score as many configurations on the same images as one likes."""
    take(plan_finals("demo", place)[0])
    fingerprint = scan(place.data).fingerprint
    write_study(place.storage, [([0.3, 0.6], OTHER)], name="demo@2", data=fingerprint)
    with pytest.raises(UsageError, match="trial 0 of demo"):
        plan_finals("demo@2", place)
    assert make_report("demo@2", place).test_uses == 1


def test_a_score_does_not_pass_to_another_trial_of_the_same_number(place):
    """A study may be deleted and searched again under its name."""
    take(plan_finals("demo", place)[0])
    optuna.delete_study(study_name="demo", storage=place.storage)
    write_study(place.storage, [([0.3, 0.6], OTHER)], data=scan(place.data).fingerprint)
    made = make_report("demo", place)
    assert made.test_uses == 1 and all(row.test_accuracy is None for row in made.rows)
    summary = next(s.summary for s in make_overview(place).studies if s.name == "demo")
    assert summary.test is None and summary.test_uses == 1


def test_metrics_that_were_cut_off_are_no_score(place):
    (plan,) = plan_finals("demo", place)
    plan.unfinished.mkdir(parents=True)
    (plan.unfinished / "metrics.json").write_text('{"result": {"study": "de')
    (plan.unfinished / "model.safetensors.1.tmp").write_text("half")
    assert take(plan).test_images == 12
    assert not list(plan.folder.glob("*.tmp"))


def test_lost_weights_are_trained_again_and_nothing_is_scored(place, monkeypatch):
    (plan,) = plan_finals("demo", place)
    scored = take(plan)
    weights = (plan.folder / "model.safetensors").read_bytes()
    assert plan_finals("demo", place, retrain=True)[0].index is None  # nothing is lost
    shutil.rmtree(plan.folder)
    with pytest.raises(UsageError, match="final --study demo --retrain"):
        find_model("demo", place)
    (without,) = plan_finals("demo", place)
    assert without.index is None and take(without, "lost") == scored
    (again,) = plan_finals("demo", place, retrain=True)
    with monkeypatch.context() as patched:
        patched.setattr(final, "load_test_data", None)  # not looked at
        assert take(again, "restored", retrain=True) == scored
    assert take(again, "before", retrain=True) == scored
    shutil.rmtree(plan.folder)
    assert take(plan, "restored", retrain=True) == scored  # of before the score
    assert (plan.folder / "model.safetensors").read_bytes() == weights
    assert {path.name for path in plan.folder.iterdir()} == {"model.safetensors", "model.json", "curves.png"}
    assert len(ledger.scores(place.storage, "demo")) == 1 and take(again) == scored
    assert "test top-1" in find_model("demo", place).words


def test_weights_that_come_back_leave_what_the_test_images_told(place):
    (plan,) = plan_finals("demo", place)
    scored = take(plan)
    told = [(plan.folder / name).read_bytes() for name in ("metrics.json", "confusion.png")]
    (plan.folder / "model.safetensors").unlink()
    (again,) = plan_finals("demo", place, retrain=True)
    assert take(again, "restored", retrain=True) == scored
    assert [(plan.folder / name).read_bytes() for name in ("metrics.json", "confusion.png")] == told
    assert (plan.folder / "model.safetensors").is_file() and len(ledger.scores(place.storage, "demo")) == 1


def test_a_repetition_of_a_study_scores_no_recipe_again(place):
    (plan,) = plan_finals("demo", place)
    scored = take(plan)
    data = scan(place.data).fingerprint
    write_study(place.storage, [([0.1, 0.9], SHORT)], data=data, name="demo@2")
    (repeated,) = plan_finals("demo@2", place)
    assert repeated.recipe == plan.recipe and repeated.stored == scored
    assert take(repeated, "before") == scored and repeated.folder == plan.folder  # nothing is lost
    assert len(ledger.family_scores(place.storage, "demo")) == 1
    shutil.rmtree(plan.folder)
    assert take(plan_finals("demo@2", place)[0], "lost") == scored


def test_other_unreadable_images_than_the_search_had_are_refused(place):
    """The recipe's hash would stand for another training."""
    (plan,) = plan_finals("demo", place)
    broken = plan.index.root / plan.index.training[0].path
    broken.write_bytes(bytes(broken.stat().st_size))  # of the same size: the same data, by its names
    with pytest.raises(DataError, match="more or fewer images can be read"):
        take(plan, skip_unreadable=True)
    assert not ledger.scores(place.storage, "demo")


def test_two_calls_cannot_both_be_the_first(place):
    one, other = plan_finals("demo", place)[0], plan_finals("demo", place, trial=1)[0]
    first = take(one)
    with pytest.raises(UsageError, match="was used before"):
        take(other)
    assert take(one, "before") == first
    for plan in (one, replace(one, study="demo@2")):  # a repetition's score would be the second, too
        with final_lock(one), pytest.raises(StorageError, match="another final training of study 'demo'"):
            take(plan)


def test_seeds_are_the_trials_own_and_the_next_and_each_is_taken_once(place):
    (single,) = plan_finals("demo", place)
    first = take(single)
    plans = plan_finals("demo", place, seeds=2)
    assert [plan.recipe.seed for plan in plans] == [0, 1]
    assert [plan.stored for plan in plans] == [first, None]
    assert plans[0].folder != plans[1].folder
    events = list(run_finals(plans, device="cpu", workers=2))
    results = [event.result for event in events if isinstance(event, Scored)]
    assert results[0] == first and results[1].seed == 1
    (planned,) = [event for event in events if isinstance(event, RetrainingPlanned)]
    assert planned.plans == (plans[1],) and events.index(planned) == 1
    events.remove(planned)
    assert [(type(e), e.plan.recipe.seed) for e in events] == [
        (Scored, 0), (RetrainingStarted, 1), (RetrainingEpoch, 1), (RetrainingEpoch, 1), (ScoringStarted, 1),
        (Scored, 1),
    ]  # fmt: skip
    assert [row.seed for row in ledger.scores(place.storage)] == [0, 1]
    made = over_seeds(results)
    assert made.test_accuracy == pytest.approx(sum(r.test_accuracy for r in results) / 2)
    assert (made.seeds, list(made.results)) == (2, results)


def test_the_seed_after_the_last_is_the_first(place):
    recipe = plan_finals("demo", place)[0].recipe
    assert [seeded(recipe, SEEDS - 1 + i).seed for i in range(3)] == [SEEDS - 1, 0, 1]


def test_a_score_that_another_call_took_while_this_one_trained_is_kept(place, tmp_path, monkeypatch):
    """On a server the lock may break for a while."""
    (plan,) = plan_finals("demo", place)
    elsewhere = shutil.copytree(place.home, tmp_path / "elsewhere")
    (twin,) = plan_finals("demo", Place(elsewhere, default_url(elsewhere), data=place.data))
    taken = take(twin, "now")
    (row,) = ledger.scores(default_url(elsewhere), "demo")

    def trained(jobs, executor, **options):
        for event in train_each(jobs, executor, **options):
            if isinstance(event, Trained):
                ledger.record(place.storage, row)
            yield event

    monkeypatch.setattr(retraining, "train_each", trained)
    monkeypatch.setattr(final, "_evaluate", None)  # the test set is not looked at
    assert take(plan, "before") == taken and len(ledger.scores(place.storage, "demo")) == 1


def test_a_training_that_fails_leaves_the_other_seeds_scores(place, monkeypatch):
    def trained(jobs, executor, **options):
        yield from train_each(jobs[:1], executor, **options)
        raise training_failure(Failed(1, "out of memory", "20 GiB"))

    with monkeypatch.context() as patch, pytest.raises(CaltechHpoError, match="20 GiB"):
        patch.setattr(retraining, "train_each", trained)
        list(run_finals(plan_finals("demo", place, seeds=2), device="cpu"))
    assert [row.seed for row in ledger.scores(place.storage, "demo")] == [0]
    with pytest.raises(UsageError, match="trial 0 seed 1 has no score"):
        plan_finals("demo", place, seeds=2, retrain=True)
    plans = plan_finals("demo", place, seeds=2)
    hows = [event.how for event in run_finals(plans, device="cpu") if isinstance(event, Scored)]
    assert hows == ["before", "now"]


def test_memory_that_runs_out_in_the_scoring_says_what_to_do(place, monkeypatch):
    from caltech_hpo.training import trained

    (plan,) = plan_finals("demo", place)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with monkeypatch.context() as patch, pytest.raises(CaltechHpoError, match="no memory to score") as raised:
        patch.setattr(trained, "load_model", full)
        take(plan)
    assert "--workers 1" in str(raised.value) and ledger.scores(place.storage, "demo") == []
    assert take(plan, "now").test_images == 12


def test_before_the_score_an_interruption_loses_no_training(place, monkeypatch):
    (plan,) = plan_finals("demo", place)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(retraining, "score", interrupt)
        take(plan)
    assert ledger.scores(place.storage) == []
    events = list(run_finals(plan_finals("demo", place), device="cpu"))
    told = [(event.result.epoch, event.before) for event in events if isinstance(event, RetrainingEpoch)]
    assert told == [(1, True), (2, True)]
    assert events[-1].how == "now" and (plan.folder / "model.safetensors").is_file()


def test_what_is_left_out_is_said(place):
    """Of every split; and a class whose test images cannot be read is not in the score."""
    index = scan(place.data)
    last = [sample.path for sample in index.test if sample.label == 1]
    for path in last:
        (place.data / path).write_bytes(b"no image")
    write_study(place.storage, [([0.1, 0.9], SHORT)], name="demo@2", data=scan(place.data).fingerprint)
    (plan,) = plan_finals("demo@2", place)
    told = []
    assert take(plan, skip_unreadable=True, say=told.append).test_images == 12 - len(last)
    assert told[0].startswith(f"left out, since unreadable: {len(last)} image(s) (test: {last[0]}, ")
    assert told[1] == f"without a readable test image, so not in the score: {index.classes[1]}"


@pytest.mark.parametrize("broken", ["record", "finish"])
def test_an_interrupted_scoring_is_finished_and_not_repeated(place, monkeypatch, broken):
    (plan,) = plan_finals("demo", place)
    owner = ledger if broken == "record" else final
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(owner, broken, interrupt)
        with pytest.raises(KeyboardInterrupt):
            take(plan)
    assert not plan.folder.exists()
    (again,) = plan_finals("demo", place)
    assert (again.stored is None) is (broken == "record")
    with monkeypatch.context() as patch:
        patch.setattr(final, "_evaluate", interrupt)
        result = take(again)
    assert [row.result for row in ledger.scores(place.storage)] == [result]
    assert (plan.folder / "model.safetensors").is_file() and (plan.folder / "curves.png").is_file()
    assert not plan.unfinished.exists() and is_settled(plan_finals("demo", place)[0])


def test_a_score_from_before_the_ledger_stands(place):
    study = write_study(place.storage, [], data=scan(place.data).fingerprint)
    recipe = trial_records(study)[0].recipe
    old = {
        "study": "demo", "trial": 0, "params": SHORT, "best_epoch": 2, "val_accuracy": 0.9,
        "test_accuracy": 0.75, "test_mean_per_class_accuracy": 0.5, "test_images": 12, "ci95": [0.5, 0.9],
        "fit_on": "train", "model": "m", "recipe_hash": recipe.hash, "seeds": 1,
    }  # fmt: skip
    study.set_user_attr(f"final:{recipe.hash}", old)
    (plan,) = plan_finals("demo", Place(place.home, place.storage))
    assert plan.stored.test_accuracy == 0.75 and plan.index is None
    with pytest.raises(UsageError, match=r"top-1 0\.7500, before the ledger"):
        plan_finals("demo", place, trial=1)
    (shown,) = library_final("demo", home=place.home)
    assert shown == take(plan) and shown.seed is None
    told = answer("final", "--study", "demo", "--home", place.home, cwd=place.home, run=here)
    assert (told["test_accuracy"], told["model"]) == (0.75, None)
    assert make_report("demo", place).test_uses == 1


@pytest.mark.parametrize("trial", [7, -1])
def test_a_trial_that_is_not_there(place, trial):
    with pytest.raises(UsageError, match=f"trial {trial} of study 'demo' is not there"):
        plan_finals("demo", place, trial=trial)


@pytest.mark.parametrize("values", [[0.5, 0.6], [0.51, 0.52, 0.55], [0.9, 0.9, 0.9, 0.8]])
def test_the_interval_of_a_mean_is_scipys(values):
    made = mean_interval(values)
    found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert made.ci95 == pytest.approx((found.low, found.high))
    assert made.mean == pytest.approx(sum(values) / len(values))


def test_an_accuracys_interval_ends_at_0_and_1():
    assert mean_interval([0.5, 1.0]).ci95[1] > 1
    assert mean_accuracy([0.5, 1.0]).ci95 == (0.0, 1.0)
    made = mean_accuracy([0.50, 0.51])
    assert made == mean_interval([0.50, 0.51]) and 0 < made.ci95[0] < made.ci95[1] < 1
    assert mean_accuracy([0.5]).ci95 is None


def test_one_seed_has_no_interval():
    assert mean_interval([0.5]).model_dump() == {"mean": 0.5, "sd": None, "ci95": None}
