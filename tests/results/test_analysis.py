"""Importances: pruned trials count, and nothing makes them fail."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caltech_hpo.ranges import Choices, FloatRange, IntRange
from caltech_hpo.results.analysis import distributions, importances, scored_records, study_of
from caltech_hpo.search.records import TrialRecord
from caltech_hpo.study_files import load_study

SPEC = load_study("demo")


def record(number, value, state="complete", **params):
    drawn = random.Random(number)
    return TrialRecord(
        number=number, state=state, value=value,
        params={
            "learning_rate": 10 ** drawn.uniform(-3, -0.4), "batch_size": drawn.choice([32, 64, 128]),
            "epochs": drawn.randint(4, 8), "augmentation": drawn.choice(["center_crop", "random_crop"]),
        } | params,
        best_epoch=1, final_loss=1.0, seconds=1.0, baseline="", stop_reason="", device="cpu",
        precision="fp32", recipe=None, epochs=(),
    )  # fmt: skip


def test_a_field_that_only_the_pruned_trials_show_is_the_important_one():
    """All complete trials have a low rate; that high ones fail is known from pruned ones alone."""
    good = [record(i, 0.9 + 0.001 * (i % 7), learning_rate=0.01 + 0.0005 * (i % 5)) for i in range(20)]
    bad = [record(i, 0.1, "pruned", learning_rate=0.4 + 0.001 * i) for i in range(20, 60)]
    made = importances(SPEC, good + bad)
    assert (made.complete, made.pruned, made.reason) == (20, 40, "")
    assert next(iter(made.shares)) == "learning_rate" and made.shares["learning_rate"] > 0.5
    assert sum(made.shares.values()) == pytest.approx(1)
    assert list(made.shares.values()) == sorted(made.shares.values(), reverse=True)
    assert importances(SPEC, good).shares["learning_rate"] < made.shares["learning_rate"]


def test_failed_and_running_trials_are_left_out_and_diverged_ones_are_not():
    records = [
        record(2, 0.4, "failed"), record(0, 0.5), record(3, 0.3, "running"), record(4, None, "waiting"),
        record(5, None, "pruned"), record(6, float("nan"), "pruned"), record(7, 0.1, "pruned"),
    ]  # fmt: skip
    assert [one.number for one in scored_records(records)] == [0, 7]
    study = study_of(SPEC, scored_records(records))
    complete = [(trial.number, trial.value) for trial in study.trials if trial.state.name == "COMPLETE"]
    assert complete == [(0, 0.5), (7, 0.1)]  # under their own numbers
    made = importances(SPEC, records)
    assert (made.complete, made.pruned) == (1, 1) and made.shares is not None


ONE_VALUE = SPEC.model_copy(update={"space": {"batch_size": Choices(choices=(64,))}})


@pytest.mark.parametrize(
    ("spec", "records", "reason"),
    [
        (SPEC, [], "needs 2 finished trials, there are 0"),
        (SPEC, [record(0, 0.5)], "there is 1"),
        (SPEC, [record(0, 0.5), record(1, 0.4, "failed")], "there is 1"),
        (SPEC, [record(i, 0.5) for i in range(5)], "all trials scored the same"),
        (ONE_VALUE, [record(i, i / 10, batch_size=64) for i in range(5)], "one value only"),
    ],
)
def test_where_there_is_nothing_to_compute_a_reason_is_given(spec, records, reason):
    made = importances(spec, records)
    assert made.shares is None and reason in made.reason


def test_queued_values_outside_the_space_stretch_it():
    space = {
        "learning_rate": FloatRange(low=0.001, high=0.5, log=True), "epochs": IntRange(low=4, high=8, step=2),
        "batch_size": Choices(choices=(32, 64)),
    }  # fmt: skip
    spec = SPEC.model_copy(update={"space": space})
    found = distributions(spec, [record(0, 0.5, learning_rate=1.0, epochs=12, batch_size=32)])
    assert (found["learning_rate"].low, found["learning_rate"].high) == (0.001, 1.0)
    assert (found["epochs"].high, found["epochs"].step) == (12, 2)
    found = distributions(spec, [record(0, 0.5, learning_rate=0.0, epochs=9, batch_size=48)])
    assert not found["learning_rate"].log and found["epochs"].step == 1
    assert found["batch_size"].choices == (32, 64, 48)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1), st.sampled_from(["complete", "pruned", "failed"]),
            st.sampled_from([1e-9, 0.001, 0.05, 0.5, 3.0]), st.integers(1, 20),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_no_set_of_trials_makes_it_fail(rows):
    records = [
        record(i, value, state, learning_rate=rate, epochs=epochs)
        for i, (value, state, rate, epochs) in enumerate(rows)
    ]
    made = importances(SPEC, records)
    assert (made.shares is None) == bool(made.reason)
    if made.shares is not None:
        assert sum(made.shares.values()) == pytest.approx(1) and set(made.shares) == set(SPEC.space)
