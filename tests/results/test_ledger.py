"""The ledger of test scores: what is kept, what old databases bring along, what reading leaves alone."""

from __future__ import annotations

import hashlib
import multiprocessing
import sqlite3

import pytest
from helpers import record_all, write_study
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from caltech_hpo.data.dataset import Sample
from caltech_hpo.results.ledger import (
    BEFORE,
    FinalResult,
    ScoreRow,
    final_scores,
    list_hash,
    record,
    scores,
)
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.urls import default_url

PARAMS = {"learning_rate": 0.1, "epochs": 4}


@pytest.fixture
def url(tmp_path):
    return default_url(tmp_path)


def result(recipe_hash, trial=0, accuracy=0.5, fit_on="train", study="demo"):
    return FinalResult(
        study=study, trial=trial, params={}, best_epoch=1, val_accuracy=0.5, test_accuracy=accuracy,
        test_mean_per_class_accuracy=0.4, test_images=100, ci95=(0.4, 0.6), fit_on=fit_on, model="m",
        recipe_hash=recipe_hash,
    )  # fmt: skip


def row(recipe_hash="a" * 16, test_list="c" * 64, reason="", study="demo", **changes):
    made = result(recipe_hash, study=study, **changes)
    return ScoreRow(
        study=study, trial=made.trial, recipe_hash=recipe_hash, configuration="b" * 16, seed=2**32 - 1,
        fit_on=made.fit_on, model_file=made.model, test_list=test_list, test_images=100,
        top1=made.test_accuracy, mean_per_class=0.4, taken_at="2030-01-01T00:00:00+00:00",
        reason=reason, version="0", result=made,
    )  # fmt: skip


def tables(tmp_path):
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}


def test_a_score_is_kept_whole_and_in_order(url):
    write_study(url, [])
    rows = [row(), row("d" * 16, reason="asked twice", accuracy=0.25), row(study="other")]
    kept = [record(url, each) for each in rows]
    assert [one.id for one in kept] == [1, 2, 3]
    assert [one.model_copy(update={"id": None}) for one in kept] == rows
    assert scores(url, "demo") == kept[:2] and scores(url, "other") == kept[2:]
    assert scores(url) == kept and scores(url, "absent") == []


@pytest.mark.parametrize(("changes", "count"), [({}, 1), ({"test_list": ""}, 2), ({"study": "other"}, 2)])
def test_the_first_score_of_a_recipe_on_a_test_list_stays(url, changes, count):
    write_study(url, [])
    first = record(url, row())
    second = record(url, row(accuracy=0.9, **changes))
    assert len(scores(url)) == count
    assert (second == first) is (count == 1)


def test_reading_creates_nothing(url, tmp_path):
    assert scores(url) == [] and not (tmp_path / "studies.db").exists()
    write_study(url, [([0.1, 0.5], PARAMS)])
    before = (tmp_path / "studies.db").read_bytes()
    assert scores(url) == scores(url, "demo") == []
    assert (tmp_path / "studies.db").read_bytes() == before
    assert "final_scores" not in tables(tmp_path)


def old_database(url):
    """A study whose best trial was scored twice, by a version that wrote study attributes."""
    study = write_study(url, [([0.1, 0.5, 0.4], PARAMS), ([0.2], PARAMS)])
    recipe = trial_records(study)[0].recipe
    both = recipe.model_copy(update={"fit_on": "train+val", "epochs": 2})
    lost = "0" * 16  # a recipe that no trial has
    for made in (result(recipe.hash, 0), result(both.hash, 0, fit_on="train+val"), result(lost, 1)):
        study.set_user_attr(f"final:{made.recipe_hash}", made.model_dump(mode="json", exclude={"seed"}))
    return recipe, both, lost


def test_scores_from_before_the_ledger_are_read_where_they_are(url, tmp_path):
    recipe, both, lost = old_database(url)
    before = (tmp_path / "studies.db").read_bytes()
    found = scores(url, "demo")
    assert {(one.recipe_hash, one.configuration, one.seed) for one in found} == {
        (recipe.hash, recipe.configuration, 0), (both.hash, both.configuration, 0), (lost, lost, None),
    }  # fmt: skip
    assert all((one.id, one.taken_at, one.test_list, one.reason) == (None, BEFORE, "", "") for one in found)
    assert (tmp_path / "studies.db").read_bytes() == before


def test_the_first_new_score_brings_the_old_ones_along_once(url):
    old_database(url)
    old = scores(url, "demo")
    for name in ("d", "e"):
        record(url, row(name * 16))
        found = scores(url)
        assert [one.id for one in found] == list(range(1, len(found) + 1))
        assert [one.model_copy(update={"id": None}) for one in found[:3]] == old
    assert len(found) == 5


def test_several_processes_record_at_once(url):
    old_database(url)
    context = multiprocessing.get_context("spawn")
    rows = {
        name: [row(f"{prefix}{number:015x}") for number in range(5) for prefix in ("0", name)]
        for name in "ab"
    }
    processes = [context.Process(target=record_all, args=(url, mine)) for mine in rows.values()]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(scores(url)) == 3 + 5 + 10


def test_the_test_list_is_the_hash_of_its_lines():
    samples = (Sample("ant/1.png", 0), Sample("Bee/ü.png", 1))
    expected = hashlib.sha256("ant/1.png\t0\nBee/ü.png\t1\n".encode()).hexdigest()
    assert list_hash(samples) == expected
    assert len({list_hash(samples), list_hash(samples[::-1]), list_hash(samples[:1])}) == 3


@pytest.mark.parametrize("dialect", [sqlite, postgresql])
def test_the_table_is_made_on_both_databases(dialect):
    text = str(CreateTable(final_scores, if_not_exists=True).compile(dialect=dialect.dialect()))
    assert "IF NOT EXISTS final_scores" in text and "UNIQUE (study, recipe_hash, test_list)" in text
    assert "top1 DOUBLE" in text and "seed BIGINT" in text  # a seed has 32 bits, without a sign
