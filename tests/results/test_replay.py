"""What other pruners would have done with a stored search, over a real SQLite database."""

from __future__ import annotations

import math

import pytest
from made_studies import searched

from caltech_hpo.errors import UsageError
from caltech_hpo.results.replay import default_pruners, parse_pruner, replay, replay_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.urls import default_url
from caltech_hpo.spec import Baseline, PrunerSpec, Published

MEDIAN = PrunerSpec(name="median", startup_trials=1, warmup_epochs=2)


def wavering(trial, epoch):
    """Curves that cross: some trials start well, others end well."""
    return round(0.5 + 0.04 * math.sin(3.0 * trial + 1.0) + 0.03 * epoch * math.cos(2.0 * trial), 4)


@pytest.mark.parametrize(
    ("name", "compare_at"),
    [("median", "fraction"), ("percentile", "epoch"), ("hyperband", "fraction"), ("none", "epoch")],
)
def test_a_search_replayed_with_its_own_pruner_is_the_same_search(tmp_path, name, compare_at):
    pruner = PrunerSpec(
        name=name,
        startup_trials=2,
        warmup_epochs=2,
        percentile=40.0,
        compare_at=compare_at,
        reduction_factor=2,
    )
    _, records = searched(tmp_path, wavering, trials=9, pruner=pruner, baselines=(), diverging=(1, 6))
    lagged = [record for record in records if record.stop_reason.startswith("lagging")]
    assert bool(lagged) == (name != "none")  # or there would be nothing to compare
    made = replay(
        "demo", Place(tmp_path, default_url(tmp_path)), pruners=[f"{name}:warmup_epochs=2"]
    )  # the other fields from the stored study
    (own,) = made.pruners
    assert own.pruner == pruner
    assert own.trials_pruned == len(lagged) and own.epochs_saved == 0 and own.regret == 0.0
    assert made.cut_short == sum(record.state == "pruned" for record in records) >= len(lagged) + 1
    assert made.epochs == sum(len(record.epochs) for record in records)


@pytest.mark.parametrize("name", ["median", "percentile", "hyperband"])
def test_a_full_search_tells_what_pruning_would_have_given(tmp_path, name):
    """The replay of an unpruned search prunes what the pruned search pruned, where it does so first."""
    pruner = PrunerSpec(name=name, startup_trials=1, warmup_epochs=2, reduction_factor=2)
    (tmp_path / "full").mkdir()
    spec, full = searched(tmp_path / "full", wavering, trials=12, pruner=pruner, baselines=(), pruning=False)
    assert all(record.state == "complete" for record in full)
    made = replay_records(spec, full, [pruner])
    (row,) = made.pruners
    assert made.cut_short == 0 and 0 < row.trials_pruned < 12
    assert 0 < row.epochs_saved < made.epochs
    assert row.seconds_saved == 2.0 * row.epochs_saved
    assert row.share_saved == pytest.approx(row.epochs_saved / made.epochs)
    left = [record for record in full if record.number != made.winner]
    if row.winner_pruned_at is None:
        assert (row.best_trial, row.regret) == (made.winner, 0.0)
    else:
        assert row.best_value <= max(record.value for record in left)
        assert row.regret == pytest.approx(made.winner_value - row.best_value)


def late(trial, epoch):
    """The second trial is the best one, and starts worst."""
    return 0.1 * epoch if trial == 1 else 0.35


SIX = tuple(Baseline(name=str(i), params={"epochs": 6}) for i in range(3))


@pytest.mark.parametrize(
    ("pruner", "pruned_at", "best"),
    [
        (MEDIAN, 2, 0.35),
        (MEDIAN.model_copy(update={"warmup_epochs": 4}), None, 0.6),
        (MEDIAN.model_copy(update={"warmup_epochs": 3}), 3, 0.35),
        (MEDIAN.model_copy(update={"startup_trials": 2}), None, 0.6),
        (PrunerSpec(name="none"), None, 0.6),
    ],
)
def test_a_winner_that_starts_slowly(tmp_path, pruner, pruned_at, best):
    spec, records = searched(tmp_path, late, trials=3, pruner=MEDIAN, baselines=SIX, pruning=False)
    (row,) = replay_records(spec, records, [pruner]).pruners
    assert row.winner_pruned_at == pruned_at and row.best_value == pytest.approx(best)
    assert row.regret == pytest.approx(0.6 - best)
    if pruned_at:
        assert row.epochs_saved >= 6 - pruned_at
        assert row.trials_pruned == 1  # the third is level with the first


def test_rows_with_published_figures_are_never_pruned(tmp_path):
    rows = (SIX[0], SIX[1].model_copy(update={"published": Published(validation=0.5)}), SIX[2])
    spec, records = searched(tmp_path, late, trials=3, pruner=MEDIAN, baselines=rows, pruning=False)
    (row,) = replay_records(spec, records, [MEDIAN]).pruners
    assert row.winner_pruned_at is None and row.regret == 0.0


def test_a_study_without_a_complete_trial_has_no_winner_and_no_regret(tmp_path):
    _, records = searched(tmp_path, wavering, trials=2, pruner=MEDIAN, baselines=(), diverging=(0, 1))
    assert {record.state for record in records} == {"pruned"}
    made = replay("demo", Place(tmp_path, default_url(tmp_path)))
    assert (made.winner, made.cut_short, len(made.pruners)) == (None, 2, 6)
    assert all(row.best_value is None and row.regret is None for row in made.pruners)


def test_failed_trials_keep_their_numbers_and_do_not_count(tmp_path):
    spec, records = searched(tmp_path, late, trials=3, pruner=MEDIAN, baselines=SIX, pruning=False)
    moved = [record.model_copy(update={"number": 2 * record.number + 1}) for record in records]
    moved.insert(0, records[0].model_copy(update={"number": 0, "state": "failed"}))
    made = replay_records(spec, moved, [MEDIAN])
    assert (made.trials, made.winner) == (3, 3)
    assert made.pruners[0].winner_pruned_at == 2


def test_pruners_as_they_are_written_on_the_command_line():
    declared = PrunerSpec(name="median", warmup_epochs=12, startup_trials=3)
    made = parse_pruner("percentile:percentile=25,warmup_epochs=5", declared)
    assert made == PrunerSpec(name="percentile", percentile=25, warmup_epochs=5, startup_trials=3)
    assert parse_pruner("hyperband", declared, "fraction").compare_at == "fraction"
    assert parse_pruner("hyperband:compare_at=epoch", declared, "fraction").compare_at == "epoch"
    names = [(p.name, p.compare_at) for p in default_pruners(declared, None)]
    assert names[0] == ("median", "epoch") and len(names) == len(set(names)) == 6
    assert [p.compare_at for p in default_pruners(declared, "fraction")] == ["epoch"] + ["fraction"] * 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fastest", "--pruner fastest.name"),
        ("median:percentile", "not of the form"),
        ("median:", "not of the form"),
        ("median:name=hyperband", "not of the form"),
        ("median:speed=3", "median:speed=3.speed"),
        ("percentile:percentile=200", "less than 100"),
        ("median:warmup_epochs=soon", "warmup_epochs"),
    ],
)
def test_faulty_pruners_are_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse_pruner(text, PrunerSpec())


def test_an_unknown_study_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not in the database"):
        replay("demo", Place(tmp_path, default_url(tmp_path)))
