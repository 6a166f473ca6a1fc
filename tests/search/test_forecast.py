"""What is foretold follows from the costs, the space, and what pruning did before."""

from __future__ import annotations

import json
import re
import time
from io import StringIO

import pytest
import typer
from rich.console import Console

from caltech_hpo.cli import options
from caltech_hpo.cli.plan_commands import plan_json, plan_text
from caltech_hpo.cli.search_view import SearchView
from caltech_hpo.cli.trainings_view import TrainingsView
from caltech_hpo.data.augment import AUGMENTATIONS, Augmentation
from caltech_hpo.ranges import Choices, IntRange
from caltech_hpo.search.costs import Costs
from caltech_hpo.search.events import (
    TrialEnded,
    TrialEpoch,
    TrialResumed,
    TrialStarted,
    TrialUnderway,
)
from caltech_hpo.search.forecast import Forecaster, draw
from caltech_hpo.search.messages import EpochPart, Measured
from caltech_hpo.search.planning import Plan, _timing_seconds, _to_time
from caltech_hpo.search.records import TrialRecord
from caltech_hpo.search.request import Cluster, SearchRequest, sharing
from caltech_hpo.spec import Baseline, EpochResult, PrunerSpec, Recipe
from caltech_hpo.study_files import load_study
from caltech_hpo.timings import CONCAT_COPIES, Kind, StepTime, kind_of, views_of

DEMO = load_study("demo")
FIXED = {"augmentation": "random_crop_flip", "batch_size": 10, "epochs": 10}
SPEC = DEMO.model_copy(
    update={
        "recipe": DEMO.recipe.model_copy(update=FIXED),
        "space": {"learning_rate": DEMO.space["learning_rate"]},
        "pruner": PrunerSpec(name="median", warmup_epochs=2, startup_trials=1),
        "baselines": (),
    }
)
KIND = kind_of(SPEC.recipe)
# 100 training images in batches of 10, 50 validation images: an epoch takes 10 * 0.1 + 50 * 0.02 = 2 s
TIME = StepTime(kind=KIND, setup=1.0, batch=0.1, evaluation=0.02)
IMAGES = (100, 50)


def record(number, epochs, state="complete", *, seconds=2.0, baseline="", **changes) -> TrialRecord:
    recipe = Recipe(**(SPEC.recipe.model_dump() | changes), classes=2, data="x")
    results = tuple(
        EpochResult(
            epoch=epoch, learning_rate=0.1, training_loss=1.0, validation_loss=1.0, validation_top1=0.5,
            images=100, seconds=seconds,
        )
        for epoch in range(1, epochs + 1)
    )  # fmt: skip
    return TrialRecord(
        number=number, state=state, params={}, value=0.5, best_epoch=1, final_loss=1.0, seconds=1.0,
        baseline=baseline, stop_reason="", device="cpu", precision="fp32", recipe=recipe, epochs=results,
    )  # fmt: skip


def costs(*times) -> Costs:
    return Costs(times or (TIME,), IMAGES)


def test_without_pruning_it_is_setup_and_epochs():
    found = Forecaster(SPEC, [], costs(), pruning=False).forecast(8)
    assert found.seconds == pytest.approx(8 * (1 + 10 * 2), rel=0.05)
    assert found.low < found.seconds < found.high
    assert (found.trials, found.epochs, found.pruned, found.history) == (8, 10, 0, 0)
    half = Forecaster(SPEC, [], costs(), pruning=False, parallel=2).forecast(8)
    assert half.seconds == pytest.approx(found.seconds / 2)


def test_nothing_known_is_nothing_foretold():
    assert Forecaster(SPEC, [], Costs((), IMAGES)).forecast(8) is None


def test_a_study_that_has_its_trials_needs_no_time():
    found = Forecaster(SPEC, [record(0, 10)], costs()).forecast(1)
    assert (found.trials, found.seconds, found.epochs) == (0, 0, 0)


def test_pruning_is_counted_where_there_is_history_and_assumed_elsewhere():
    assumed = Forecaster(SPEC, [], costs()).forecast(40)
    assert 0.3 < assumed.pruned < 0.7 and assumed.history == 0
    hard = [record(n, 2, "pruned") for n in range(9)] + [record(9, 10)]
    soft = [record(n, 10) for n in range(9)] + [record(9, 2, "pruned")]
    hard, soft = (Forecaster(SPEC, records, costs()).forecast(50) for records in (hard, soft))
    assert hard.history == soft.history == 10 and hard.trials == 40
    assert hard.pruned > 0.7 > 0.3 > soft.pruned and hard.seconds < assumed.seconds < soft.seconds
    assert hard.high - hard.low < assumed.high - assumed.low  # history narrows it


def test_the_first_trials_cannot_be_pruned():
    spec = SPEC.model_copy(update={"pruner": PrunerSpec(startup_trials=5, warmup_epochs=2)})
    assert Forecaster(spec, [], costs()).forecast(5).pruned == 0


def test_what_epochs_took_counts_more_than_what_steps_promised():
    slow = [record(0, 10, seconds=6.0, baseline="mine")]
    found = Forecaster(SPEC, slow, costs(), pruning=False).forecast(5)
    assert found.seconds == pytest.approx(4 * (1 + 10 * 6), rel=0.05) and found.history == 0
    # another kind was never seen: it is taken to be as much slower than its steps as this one
    both = SPEC.model_copy(update={"space": {"batch_size": Choices(choices=[20])}})
    other = StepTime(kind=KIND.model_copy(update={"batch_size": 20}), setup=0, batch=0.2, evaluation=0.02)
    found = Forecaster(both, slow, costs(TIME, other), pruning=False).forecast(5)
    assert found.seconds == pytest.approx(4 * 10 * 6, rel=0.05)


def test_hand_tuned_rows_run_whole_and_once():
    rows = (Baseline(name="a", params={"epochs": 30}), Baseline(name="b", params={"epochs": 50}))
    spec = SPEC.model_copy(update={"baselines": rows})
    found = Forecaster(spec, [], costs()).forecast(2)
    assert found.seconds == pytest.approx(2 * 1 + 80 * 2, rel=0.05)
    done = [record(0, 30, baseline="a")]
    assert Forecaster(spec, done, costs()).forecast(2).seconds == pytest.approx(1 + 50 * 2, rel=0.05)
    none = Forecaster(spec, [], costs(), baselines=False, pruning=False).forecast(2)
    assert none.seconds == pytest.approx(2 * (1 + 10 * 2), rel=0.05)


def test_what_waits_and_what_was_left_come_first_with_their_own_epochs():
    waiting = record(0, 0, "waiting").model_copy(update={"params": {"epochs": 50}, "recipe": None})
    left = record(1, 4, "running")
    own = left.recipe.model_copy(update={"epochs": 30})  # the study's file may say another number by now
    left = left.model_copy(update={"recipe": own})
    asked = Forecaster(SPEC, [waiting, left], costs(), pruning=False)
    found = asked.forecast(3)
    assert (found.trials, found.epochs) == (3, (50 + 26 + 10) / 3)
    assert found.seconds == pytest.approx(3 * 1 + (50 + 26 + 10) * 2, rel=0.05)
    assert asked.forecast(1).epochs == 26
    asked.handle(TrialResumed(1, {}, 30, 4, ""))
    assert asked.forecast(3).epochs == 30  # of what has not begun
    assert asked.forecast(3).seconds == pytest.approx(2 * 1 + (50 + 26 + 10) * 2, rel=0.05)
    asked.handle(TrialResumed(1, {}, 30, 4, ""))  # its worker died
    assert asked.forecast(3).trials == 2


def test_of_two_equal_trials_one_begins():
    spec = SPEC.model_copy(update={"baselines": (Baseline(name="a", params={"epochs": 50}),)})
    waiting = record(0, 0, "waiting").model_copy(update={"params": {"epochs": 50}, "recipe": None})
    asked = Forecaster(spec, [waiting], costs(), pruning=False)
    asked.handle(TrialStarted(0, {"epochs": 50}, 50, ""))
    assert asked.forecast(2).epochs == 50
    asked.handle(TrialStarted(1, {"epochs": 50}, 50, "a"))
    assert asked.forecast(3).epochs == 10


def test_trials_of_another_device_count_but_tell_no_times():
    there = [record(n, 10, seconds=99.0).model_copy(update={"device": "cuda:0"}) for n in range(3)]
    found = Forecaster(SPEC, there, costs(), pruning=False, device="cpu").forecast(5)
    assert (found.trials, found.history) == (2, 3)
    assert found.seconds == pytest.approx(2 * (1 + 10 * 2), rel=0.05)


def test_who_waits_counts_for_the_pruners_start():
    spec = SPEC.model_copy(update={"pruner": PrunerSpec(startup_trials=5, warmup_epochs=2)})
    waiting = [record(n, 0, "waiting").model_copy(update={"recipe": None}) for n in range(5)]
    assert Forecaster(spec, waiting, costs()).forecast(10).pruned > 0.1


def test_what_is_shown_is_right_when_a_trial_has_ended():
    """Epochs that come in a burst are not each worth a forecast; the end of a trial is."""
    console = Console(file=StringIO(), width=200)
    forecaster = Forecaster(SPEC, [], costs(), pruning=False)
    view = SearchView(console, "demo", 1, [], forecaster)
    view.handle(TrialStarted(0, {}, 10, ""))
    for result in record(0, 10).epochs:
        view.handle(TrialEpoch(0, result, 0.5))
    assert view._left != "0 s"
    view.handle(TrialEnded(0, "complete", 0.5, "finished"))
    assert view._left == "0 s" and "trial 0 complete" in console.file.getvalue()


def test_workers_of_a_cluster_share_a_gpu_by_their_shares():
    assert sharing(8, None) == sharing(8, Cluster()) == 8
    assert sharing(64, Cluster(gpus=0.25)) == 4 and sharing(2, Cluster(gpus=0.25)) == 2
    assert sharing(64, Cluster(gpus=2.0)) == 1


def test_frozen_prefixes_are_computed_once():
    spec = SPEC.model_copy(
        update={
            "recipe": SPEC.recipe.model_copy(
                update={"freeze": "features", "augmentation": "center_crop_flip"}
            )
        }
    )
    time = TIME.model_copy(update={"kind": kind_of(spec.recipe), "once": 0.1, "kept": 1000})
    assert time.kind.views == 2
    one, nine = (Forecaster(spec, [], costs(time), pruning=False).forecast(n).seconds for n in (1, 9))
    assert one == pytest.approx(21 + 0.1 * (2 * 100 + 50), rel=0.05)
    assert nine - one == pytest.approx(8 * 21, rel=0.1)


def test_a_prefixs_outputs_are_there_once_a_training_drew_from_them():
    def time(**changes):
        kind = Kind(freeze="features", frozen_blocks=0, views=2, batch_size=10)
        return TIME.model_copy(update={"kind": kind.model_copy(update=changes), "once": 0.1})

    mine, other_batch, plain = time(), time(batch_size=20), time(views=1)
    all_views = 0.1 * (2 * 100 + 50)
    for seen, expected in ((None, all_views), (mine, 0), (other_batch, 0), (plain, all_views)):
        known = {} if seen is None else {seen.kind: [2.0]}
        found = Costs((mine, other_batch), IMAGES, known).once({mine.kind, other_batch.kind})
        assert found == pytest.approx(expected)


def test_it_learns_from_the_search_it_watches():
    watched = Forecaster(SPEC, [], costs(), pruning=False)
    before = watched.forecast(4).seconds
    watched.handle(TrialStarted(0, {"learning_rate": 0.1}, 10, ""))
    assert watched.forecast(4).trials == 3
    result = record(0, 1, seconds=20.0).epochs[0]
    watched.handle(TrialEpoch(0, result, 0.5))
    assert watched.forecast(4).seconds == pytest.approx(9 * 20 + 3 * (1 + 200), rel=0.05)
    watched.handle(TrialEnded(0, "complete", 0.5, "finished"))
    after = watched.forecast(4)
    assert (after.trials, after.history) == (3, 1) and after.seconds > before
    watched.handle(TrialStarted(1, {"learning_rate": 0.1}, 10, ""))
    watched.handle(TrialEnded(1, "failed", None, "out of memory"))
    assert watched.forecast(4).trials == 3  # a failed trial does not count
    watched.handle(TrialStarted(2, {"learning_rate": 0.1}, 10, "by hand"))
    watched.handle(TrialEnded(2, "complete", 0.5, "finished"))
    after = watched.forecast(4)
    assert (after.trials, after.history) == (2, 1)  # hand-tuned rows say little of the others


def test_one_example_of_each_kind_the_usual_one_first():
    spec = SPEC.model_copy(
        update={
            "space": {"frozen_blocks": IntRange(low=0, high=2), "batch_size": Choices(choices=[10])},
            "baselines": (Baseline(name="a", params={"batch_size": 99}),),
        }
    )
    found = [
        kind_of(spec.recipe.model_copy(update=params)) for params in Forecaster(spec, [], costs()).examples()
    ]
    assert len(found) == 4 and found[-1].batch_size == 99
    assert {kind.frozen_blocks for kind in found} == {0, 1, 2}


def test_what_runs_already_needs_no_timing():
    """A search that goes on in its first trial asks for no other kind than those that cost otherwise."""
    spec = SPEC.model_copy(
        update={
            "space": {
                "batch_size": Choices(choices=[10, 20]),
                "augmentation": Choices(choices=["random_crop", "concat"]),
            }
        }
    )
    running = record(0, 2, "running", seconds=6.0)
    assert len(Forecaster(spec, [], Costs((), IMAGES)).examples()) == 4
    found = Forecaster(spec, [running], Costs((), IMAGES), pruning=False)
    assert {params["augmentation"] for params in found.unseen()} == {"concat"}
    assert len(found.examples()) == 4 and found.forecast(1).trials == 1
    # batches of another size take as long; four copies take what their own steps promise
    slow = StepTime(kind=KIND.model_copy(update={"copies": 4}), setup=1.0, batch=0.1, evaluation=0.02)
    known = Costs((slow,), IMAGES, {KIND: [6.0]})
    assert known.epoch(KIND.model_copy(update={"batch_size": 20})) == 6.0
    assert known.epoch(slow.kind) == 40 * 0.1 + 50 * 0.02
    # of the nearest in size, and not of another number of copies
    wide = Costs((slow,), IMAGES, {KIND.model_copy(update={"batch_size": 20}): [6.0]})
    assert wide.epoch(slow.kind.model_copy(update={"batch_size": 20})) == pytest.approx(20 * 0.2 + 50 * 0.02)
    assert Costs((), IMAGES, {KIND: [6.0]}).epoch(slow.kind) == 4 * 6.0


def test_kinds_agree_with_the_augmentations():
    for name, what in AUGMENTATIONS.items():
        recipe = SPEC.recipe.model_copy(update={"augmentation": name, "freeze": "features"})
        views = {Augmentation(): 1, Augmentation(flip=0.5): 2}.get(what, 0)
        assert views_of(recipe) == kind_of(recipe).views == views
        assert kind_of(recipe).copies == (len(what.copies) or 1)
        assert kind_of(recipe.model_copy(update={"mixup": 0.2})).views == 0
        assert kind_of(recipe.model_copy(update={"freeze": "none"})).views == 0
    assert CONCAT_COPIES == 4


def test_the_nearest_kind_shares_most():
    def kind(**changes):
        values = {"freeze": "none", "frozen_blocks": 0, "batch_size": 64, "views": 0}
        return Kind(**(values | changes))

    assert kind().distance(kind()) == 0
    order = [
        {"batch_size": 128},
        {"frozen_blocks": 1},
        {"frozen_blocks": 3},
        {"frozen_blocks": 1, "views": 2},
    ]
    distances = [kind().distance(kind(**changes)) for changes in order]
    assert distances == sorted(distances) and len(set(distances)) == 4


def test_draws_are_the_spaces():
    drawn = draw(DEMO, 30)
    assert all(set(params) == set(DEMO.space) for params in drawn)
    assert all(DEMO.space[name].contains(value) for params in drawn for name, value in params.items())


def test_a_message_has_a_line_of_its_own_above_the_bars(monkeypatch):
    terminal = Console(file=StringIO(), width=80, force_terminal=True)
    monkeypatch.setattr(options, "STDERR", terminal)
    with options.progress_bars() as bars:
        bars("decoding", 1, 2)
        options.say("starting 1 worker")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.file.getvalue()).splitlines()
    assert "starting 1 worker" in [line.strip() for line in lines]
    assert any("decoding" in line and "1/2" in line for line in lines)


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [(KeyboardInterrupt(), 130, "interrupted; the same"), (SystemExit(143), 143, "ended; the same")],
)
def test_ctrl_c_and_sigterm_say_how_to_go_on(ending, code, words, capsys):
    from caltech_hpo.cli import options

    with pytest.raises(typer.Exit) as stopped, options.goes_on():
        raise ending
    assert stopped.value.exit_code == code and words in capsys.readouterr().err
    with pytest.raises(SystemExit), options.goes_on():
        raise SystemExit(2)


def test_a_file_gets_its_answer_while_bars_are_shown(monkeypatch, capsys):
    """rich would show it above the bars instead, on the terminal."""
    from caltech_hpo.cli import options

    terminal = Console(file=StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(options, "STDERR", terminal)
    with options.progress_bars() as bars:
        bars("measuring", 1, 2)
        options.answer([{"model": "alexnet"}], True, "")
    assert json.loads(capsys.readouterr().out) == [{"model": "alexnet"}]
    assert "alexnet" not in terminal.file.getvalue()


def test_what_is_trained_of_an_epoch_is_not_left():
    forecaster = Forecaster(SPEC, [], costs(), pruning=False)
    forecaster.handle(TrialStarted(0, {}, 10, ""))
    whole = forecaster.forecast(1).seconds
    forecaster.handle(TrialUnderway(0, EpochPart(1, 50, 100)))
    half = forecaster.forecast(1).seconds
    assert half == pytest.approx(whole * 9.5 / 10)
    forecaster.handle(TrialEpoch(0, record(0, 1).epochs[0], 0.5))
    assert forecaster.forecast(1).seconds == pytest.approx(whole * 9 / 10)


@pytest.mark.parametrize("terminal", [True, False])
def test_long_epochs_show_how_far_they_are(terminal, monkeypatch):
    """On a terminal always; elsewhere in a line now and then."""
    console = Console(file=StringIO(), width=200, force_terminal=terminal)
    searching = SearchView(console, "demo", 1, [], None)
    retraining = TrainingsView(console, ["trial 0 seed 1"], 3, workers=1)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    searching.handle(TrialStarted(0, {}, 3, ""))
    retraining.started("trial 0 seed 1", 3, resumed=False)
    for passed, images in ((29, 100), (31, 250), (40, 300), (62, 1500)):
        monkeypatch.setattr(time, "monotonic", lambda passed=passed: now + passed)
        searching.handle(TrialUnderway(0, EpochPart(1, images, 2000)))
        retraining.underway("trial 0 seed 1", EpochPart(1, images, 2000), 3)
    written = console.file.getvalue()
    if terminal:
        console.print(searching._render())
        assert "1,500 of 2,000 images" in console.file.getvalue() and written == ""
        searching.handle(TrialResumed(7, {}, 9, 4, ""))
        console.print(searching._render())
        assert "4/9" in console.file.getvalue()
        assert retraining._bars.tasks[0].completed == 0.75
    else:
        assert [line for line in written.splitlines() if "starts" not in line] == [
            f"trial 0{seed} epoch 1/3: {images} of 2,000 images"
            for images in ("250", "1,500") for seed in ("", " seed 1")
        ]  # fmt: skip


def test_steps_that_differ_make_the_range_wider_until_epochs_are_seen():
    uneven = TIME.model_copy(update={"spread": 4.0})

    def width(records, *times):
        found = Forecaster(SPEC, records, costs(*times), pruning=False).forecast(4)
        return found.high / found.low

    even = width([], TIME)
    assert width([], uneven, uneven, TIME) > 3 * even and width([], uneven, TIME, TIME) == even
    assert width([record(0, 3)], uneven) == width([record(0, 3)], TIME)


@pytest.mark.parametrize(("untimed", "spread", "notes"), [(0, 1.2, 0), (8, 1.2, 1), (8, 3.0, 2)])
def test_a_plan_says_what_it_rests_on(untimed, spread, notes):
    found = Forecaster(SPEC, [], costs()).forecast(4)
    timed = (TIME.model_copy(update={"spread": spread}),)
    made = Plan("demo", 4, 0, found, 1, "cpu", 2.0, timed, untimed, (2.0,))
    console = Console(file=StringIO(), width=200)
    console.print(plan_text(made))
    text = console.file.getvalue()
    assert ("taken for the nearest that was: 8 of 9 kinds of training" in text) == (notes > 0)
    assert ("steps differ much" in text) == (notes > 1)
    assert plan_json(made)["untimed_kinds"] == untimed


def test_what_a_search_times_before_its_first_trial():
    """Nothing where enough trials ran on its device, or where all kinds did."""
    three, other = [record(number, 2) for number in range(3)], load_study("alexnet-scratch")
    asked = SearchRequest("demo", 9)
    assert len(_to_time(SPEC, [], asked, "cpu")) == 1 and _to_time(SPEC, three[:1], asked, "cpu") == []
    assert len(_to_time(SPEC, three, asked, "cuda:0 H100")) == 1
    assert _to_time(other, three, asked, "cpu") == [] and len(_to_time(other, three[:2], asked, "cpu")) > 1
    assert _to_time(SPEC, [], SearchRequest("demo", 2, subset=300), "cpu") == []


@pytest.mark.parametrize(
    ("device", "elapsed", "expected"),
    [("cpu", (4.0, 9.0), 9.0), ("cpu", (4.0, 17.0, 60.0), 17.0), ("cpu", (40.0, 50.0), 40.0),
     ("cuda:0 H100", (6.0, 7.0), 6.0), ("cuda:0 H100", (0.4, 0.8), 0.8)],
)  # fmt: skip
def test_how_long_it_times_them(device, elapsed, expected):
    """Until its time is over, the first kind in any case."""
    assert _timing_seconds(Measured(-1, (TIME,) * len(elapsed), elapsed=elapsed), device) == expected


def test_where_in_its_epoch_a_training_goes_on_is_told_at_once():
    console = Console(file=StringIO(), width=200)
    searching = SearchView(console, "demo", 1, [], None)
    retraining = TrainingsView(console, ["trial 0 seed 1"], 3, workers=1)
    searching.handle(TrialResumed(0, {}, 3, 0, ""))
    retraining.started("trial 0 seed 1", 3, resumed=True)
    retraining.epoch("trial 0 seed 1", record(0, 1).epochs[0], 3, before=True)
    for images in (900, 1000):
        searching.handle(TrialUnderway(0, EpochPart(1, images, 2000)))
        retraining.underway("trial 0 seed 1", EpochPart(2, images, 2000), 3)
    told = [line for line in console.file.getvalue().splitlines() if "images" in line]
    assert told == ["trial 0 epoch 1/3: 900 of 2,000 images", "trial 0 seed 1 epoch 2/3: 900 of 2,000 images"]


@pytest.mark.parametrize("terminal", [True, False])
def test_batches_in_pieces_are_told(terminal):
    console = Console(file=StringIO(), width=200, force_terminal=terminal)
    view = SearchView(console, "demo", 1, [], None)
    view.handle(TrialStarted(0, {}, 2, ""))
    result = record(0, 1).epochs[0]
    for pieces in (None, 4):
        view.handle(TrialEpoch(0, result.model_copy(update={"micro_batch": pieces}), 0.5))
        console.print(view._render())
        assert ("4 images at a time" in console.file.getvalue()) == (pieces == 4)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_lost_worker_is_told(terminal):
    console = Console(file=StringIO(), width=200, force_terminal=terminal)
    view = TrainingsView(console, ["trial 0 seed 1"], 3, workers=1)
    for lost, resumed in ((False, False), (True, False), (True, True)):
        view.started("trial 0 seed 1", 3, resumed=resumed, lost=lost)
    told = console.file.getvalue()
    assert "trial 0 seed 1: its worker was killed; it begins anew" in told
    assert "killed; it goes on from its checkpoint" in told and len(view._bars.tasks) == terminal


def test_epochs_that_are_told_again_get_no_line():
    console = Console(file=StringIO(), width=200)
    view = TrainingsView(console, ["trial 0 seed 1"], 3, workers=1)
    view.started("trial 0 seed 1", 3, resumed=True)
    epochs = record(0, 3).epochs
    for result in epochs:
        view.epoch("trial 0 seed 1", result, 3, before=result.epoch < 3)
    first, second = console.file.getvalue().splitlines()
    assert first.endswith("goes on from its checkpoint (1 of 1 trainings)") and "epoch 3/3" in second
    assert second.endswith("0 s left")
