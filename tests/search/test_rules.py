"""The divergence rule, pruners and samplers, and the way from a spec to a recipe."""

from __future__ import annotations

import math
import warnings

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from caltech_hpo.cli.search_commands import parse_params
from caltech_hpo.errors import UsageError
from caltech_hpo.ranges import Choices
from caltech_hpo.search.pruning import divergence, lags, make_pruner, make_sampler, report, reported
from caltech_hpo.search.request import check_enqueued
from caltech_hpo.search.space import Binding, recipe_for, suggest
from caltech_hpo.spec import EpochResult, PrunerSpec, SamplerSpec
from caltech_hpo.study_files import complete_params, load_study

BINDING = Binding(classes=101, data="x", seed=3, precision="bf16")


def curve(*losses, validation=None):
    return [
        EpochResult(
            epoch=i, learning_rate=0.1, training_loss=loss,
            validation_loss=validation if i == len(losses) else 1.0,
            validation_top1=0.1, images=10, seconds=1.0,
        )
        for i, loss in enumerate(losses, start=1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("results", "words"),
    [
        (curve(4.6), ""),
        (curve(math.nan), "training loss is nan at epoch 1"),
        (curve(4.6, math.inf), "training loss is inf at epoch 2"),
        (curve(4.6, 4.5, validation=math.nan), "validation loss is nan"),
        (curve(4.6, 4.5, validation=math.inf), "validation loss is inf"),
        (curve(4.0, 6.1), ""),
        (curve(4.0, 6.1, 5.9), ""),
        (curve(4.0, 6.1, 6.1), "above 1.5 times the first epoch's 4 for 2 epochs"),
        (curve(4.0, 6.1, 3.9, 6.1), ""),
        (curve(4.0, 6.0, 6.0), ""),
        (curve(4.2, 4.1, 4.2, 4.1), ""),
    ],
)
def test_divergence(results, words):
    found = divergence(results)
    assert (words in found) if words else found == ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("median", "RememberingPercentilePruner"),
        ("percentile", "RememberingPercentilePruner"),
        ("hyperband", "HyperbandPruner"),
        ("none", "NopPruner"),
    ],
)
def test_pruners_leave_the_warm_up_alone(name, kind):
    spec = load_study("alexnet-scratch").model_copy(
        update={"pruner": PrunerSpec(name=name, warmup_epochs=12, startup_trials=1)}
    )
    pruner = make_pruner(spec)
    assert type(pruner).__name__ == kind
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for _ in range(12):
        good = study.ask()
        for step in range(1, 61):
            good.report(step / 60, step)
            good.should_prune()  # Hyperband keeps its books in here
        study.tell(good, 1.0)
    bad = study.ask()
    stops = []
    for step in range(1, 61):
        bad.report(0.0092, step)
        stops.append(bad.should_prune())
    assert not any(stops[:11])
    assert any(stops[11:]) == (name != "none")


def curve_of(epochs, compare_at="fraction"):
    """All that a trial reports whose accuracy is the share of its schedule."""
    results = accuracies([epoch / epochs for epoch in range(1, epochs + 1)])
    told = {}
    for count in range(1, epochs + 1):
        new = reported(results[:count], epochs, compare_at)
        assert not told.keys() & new.keys()
        told |= new
    return told


@given(st.integers(1, 3000))
def test_a_complete_trial_has_every_percent_that_it_reached_and_nothing_of_later(epochs):
    told = curve_of(epochs)
    assert list(told) == list(range(max(1, 100 // epochs), 101))
    for step, value in told.items():  # what its last whole epoch reached, down to whole percents
        assert step - 100 / epochs - 1e-9 <= 100 * value < step + 1


@pytest.mark.parametrize(
    ("results", "epochs", "compare_at", "steps"),
    [
        ([0.1, 0.2], 50, "epoch", {2: 0.2}),
        ([0.1], 50, "fraction", {2: 0.1}),
        ([0.1, 0.2], 50, "fraction", {3: 0.1, 4: 0.2}),
        ([0.1], 3, "fraction", {33: 0.1}),
        ([0.1, None, 0.3], 3, "fraction", dict.fromkeys(range(67, 100), 0.0) | {100: 0.3}),
        ([0.1], 1, "fraction", {100: 0.1}),
        ([0.1], 200, "fraction", {}),
        ([0.1, 0.2], 200, "fraction", {1: 0.2}),
        ([0.9, 0.3, 0.2, 0.1], 200, "fraction", {2: 0.2}),
        ([0.9, 0.1, 0.4, 0.3, 0.2], 250, "fraction", {2: 0.3}),
    ],
)
def test_what_an_epoch_adds(results, epochs, compare_at, steps):
    assert reported(accuracies(results), epochs, compare_at) == steps


def test_of_trials_on_one_curve_none_lags_at_equal_shares():
    """Long ones are asked more often, and before short ones have learned as much."""
    declared = PrunerSpec(name="median", warmup_epochs=1, startup_trials=1, compare_at="fraction")
    spec = load_study("alexnet-scratch").model_copy(update={"pruner": declared})
    study = optuna.create_study(direction="maximize", pruner=make_pruner(spec))
    for epochs in (4, 4, 8, 12, 60, 7):
        trial = study.ask()
        results = accuracies([epoch / epochs for epoch in range(1, epochs + 1)])
        assert not any(asked(trial, results[:count], epochs, declared) for count in range(1, epochs + 1))
        study.tell(trial, 1.0)


def accuracies(values):
    return [
        EpochResult(
            epoch=i, learning_rate=0.1, training_loss=1.0, validation_loss=1.0, validation_top1=value,
            images=10, seconds=1.0,
        )
        for i, value in enumerate(values, start=1)
    ]  # fmt: skip


def asked(trial, results, epochs, declared):
    report(trial, results, epochs, declared)
    return lags(trial, results, epochs, declared)


@pytest.mark.parametrize("compare_at", ["epoch", "fraction"])
@pytest.mark.parametrize("name", ["median", "percentile", "hyperband", "none"])
@pytest.mark.parametrize("warmup", [1, 12, 30, 60])
def test_the_warm_up_is_counted_in_epochs_and_the_last_epoch_is_not_asked(name, compare_at, warmup):
    declared = PrunerSpec(name=name, warmup_epochs=warmup, startup_trials=1, compare_at=compare_at)
    spec = load_study("alexnet-scratch").model_copy(update={"pruner": declared})
    study = optuna.create_study(direction="maximize", pruner=make_pruner(spec))
    for _ in range(12):
        good = study.ask()
        for count in range(1, 61):
            asked(good, accuracies([0.5] * count), 60, declared)
        study.tell(good, 0.5)
    for epochs in (30, 60):
        bad = study.ask()
        results = accuracies([0.01] * epochs)
        stops = [asked(bad, results[:count], epochs, declared) for count in range(1, epochs + 1)]
        assert not any(stops[: warmup - 1]) and not stops[-1]
        if name != "hyperband":  # which may have put the trial into a bracket of its own
            assert any(stops) == (name != "none" and warmup < epochs)
        study.tell(bad, state=optuna.trial.TrialState.PRUNED)


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "cmaes"])
def test_samplers_are_seeded_and_do_not_repeat_themselves_after_a_restart(name):
    spec = load_study("alexnet-scratch").model_copy(
        update={"sampler": SamplerSpec(name=name, startup_trials=2)}
    )

    def first_points(seed, so_far, count=4):
        study = optuna.create_study(direction="maximize", sampler=make_sampler(spec, seed, so_far))
        points = []
        for number in range(count):
            trial = study.ask()
            points.append(suggest(trial, spec)["learning_rate"])
            study.tell(trial, number / 10)
        return points

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert first_points(0, 0) == first_points(0, 0)
        assert first_points(0, 0, 1) != first_points(0, 5, 1)
        assert first_points(0, 0, 1) != first_points(1, 0, 1)


def test_a_trial_becomes_a_recipe():
    spec = load_study("alexnet-scratch")
    params = complete_params(spec, {"learning_rate": 0.05, "epochs": 50, "step_size": 35})
    recipe = recipe_for(spec, params, BINDING)
    assert (recipe.learning_rate, recipe.epochs, recipe.step_size) == (0.05, 50, 35)
    assert (recipe.batch_size, recipe.weight_decay, recipe.seed) == (256, 5e-5, 3)
    assert recipe.precision == "bf16" and recipe.classes == 101
    with pytest.raises(ValidationError):
        recipe_for(spec, params | {"learning_rate": -1.0}, BINDING)


def test_every_dimension_is_drawn_inside_the_space():
    for name in ("alexnet-scratch", "alexnet-freeze", "resnet18-scratch", "demo"):
        spec = load_study(name)
        study = optuna.create_study(sampler=make_sampler(spec, 0, 0))
        for _ in range(20):
            params = suggest(study.ask(), spec)
            assert list(params) == list(spec.space)
            assert all(spec.space[key].contains(value) for key, value in params.items())
            recipe_for(spec, params, BINDING)


def test_the_sampler_lives_with_values_outside_the_space():
    spec = load_study("alexnet-scratch")
    study = optuna.create_study(direction="maximize", sampler=make_sampler(spec, 0, 0))
    study.enqueue_trial(complete_params(spec, {"learning_rate": 1.0}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial = study.ask()
        assert suggest(trial, spec)["learning_rate"] == 1.0
    trial.report(0.01, 1)
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    for number in range(15):
        trial = study.ask()
        assert spec.space["learning_rate"].contains(suggest(trial, spec)["learning_rate"])
        study.tell(trial, number / 20)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"lr": 1.0}, "lr not in the space"),
        ({"batch_size": 100}, "batch_size=100 is not one of 64, 128, 256"),
        ({"learning_rate": -1.0}, "--enqueue.learning_rate"),
        ({"learning_rate": "fast"}, "--enqueue.learning_rate"),
        ({"epochs": 0}, "--enqueue.epochs"),
    ],
)
def test_impossible_queued_values_are_refused(params, words):
    with pytest.raises(UsageError, match=words.replace(".", r"\.")):
        check_enqueued(load_study("alexnet-scratch"), params)
    check_enqueued(load_study("alexnet-scratch"), {"learning_rate": 1.0, "epochs": 3})


def test_queued_values_that_the_recipe_cannot_complete_are_asked_for():
    spec = load_study("alexnet-freeze")
    spec = spec.model_copy(
        update={"space": spec.space | {"freeze": Choices(choices=("features", "classifier"))}}
    )
    with pytest.raises(UsageError, match="give freeze too"):
        check_enqueued(spec, {"learning_rate": 0.01})
    check_enqueued(spec, {"learning_rate": 0.01, "freeze": "features"})


def test_enqueued_words_become_values():
    (found,) = parse_params(["nesterov=true,ema=0.5,epochs=3,augmentation=concat"])
    assert found == {"nesterov": True, "ema": 0.5, "epochs": 3, "augmentation": "concat"}
    assert type(found["nesterov"]) is bool
