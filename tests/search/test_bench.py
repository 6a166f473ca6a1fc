"""The bench measures what it says: real files, real processes; no test asks how fast anything is."""

from __future__ import annotations

import multiprocessing

import pytest
import typer
from helpers import write_folders

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.search.bench import _speeds, bench_recipe, fitting_batch_size, measure_speed
from caltech_hpo.search.bench_study import measure_study
from caltech_hpo.search.overhead import measure_overhead
from caltech_hpo.search.reporters import measure_reports
from caltech_hpo.search.request import Place, SearchRequest
from caltech_hpo.spec import Hyperparameters
from caltech_hpo.training.batch_timing import Timing
from caltech_hpo.training.bench import BenchTask, Ours, Stock


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    index = scan(write_folders(folder / "images", images=18))
    return index, load_search_data(index, 36, folder / "cache")


VALUES = Hyperparameters(
    architecture="resnet18", resize=36, crop=32, batch_size=4, weights="imagenet",
    augmentation="random_crop_flip",
)  # fmt: skip


def test_both_ways_and_the_floor_are_measured(images):
    index, data = images
    said = []
    recipe = bench_recipe(VALUES, data)
    assert recipe.weights == "none" and recipe.batch_size == 4
    measuring = measure_speed(
        recipe, "cpu", data, index, seconds=0.05, rounds=1, progress=lambda *what: said.append(what)
    )
    rows = list(measuring)
    assert [(row.model, row.phase) for row in rows] == [
        ("resnet18", "train"), ("resnet18", "eval"), ("resnet18", "epoch"),
    ]  # fmt: skip
    for row in rows:
        assert row.stock > 0 and row.ours > 0 and row.floor > 0 and row.data_wait_s >= 0
        assert row.over_stock == row.ours / row.stock and row.of_floor == row.ours / row.floor
        assert (row.batch_size, row.device, row.rounds) == (4, "cpu", 1)
    assert said == [("measuring resnet18", step, 12) for step in range(13)]


def test_whole_rounds_are_told_when_it_is_interrupted(images):
    index, data = images
    recipe = bench_recipe(VALUES, data)

    def progress(_, done, __):
        if done == 20:  # in the second round after the one that warms up
            raise KeyboardInterrupt

    rows = []
    with pytest.raises(KeyboardInterrupt):
        for row in measure_speed(recipe, "cpu", data, index, seconds=0.01, rounds=3, progress=progress):
            rows.append(row)
    assert [(row.phase, row.rounds) for row in rows] == [("train", 2), ("eval", 2), ("epoch", 2)]


def test_a_way_whose_process_was_killed_is_told_and_the_other_goes_on(images):
    index, data = images
    told = []

    def progress(_, done, __):
        if done == 7:  # after the round that warms up
            stock = min(multiprocessing.active_children(), key=lambda process: process.pid)
            stock.kill()
            stock.join()

    rows = list(
        measure_speed(
            bench_recipe(VALUES, data), "cpu", data, index, seconds=0.01, rounds=1, progress=progress,
            say=told.append,
        )
    )  # fmt: skip
    assert told == ["resnet18, stock: its process ended with exit code -9"]
    assert rows[-1].stock is None and rows[-1].ours > 0 and rows[-1].over_stock is None


def test_unreadable_images_can_be_left_out(tmp_path):
    index = scan(write_folders(tmp_path / "images", images=18))
    broken = index.root / index.training[0].path
    broken.write_bytes(b"no image")
    data = load_search_data(index, 36, tmp_path / "cache", skip_unreadable=True)
    rows = list(
        measure_speed(
            bench_recipe(VALUES, data), "cpu", data, index, seconds=0.01, rounds=1,
            progress=lambda *_: None,
        )
    )  # fmt: skip
    assert rows[0].stock > 0 and rows[0].ours > 0


def test_rows_are_the_medians_of_whole_epochs():
    def timings(*seconds):
        return [Timing(images=10, seconds=value, start=1.0, wait=0.5) for value in seconds]

    found = {
        ("stock", "train"): timings(4, 2, 9), ("ours", "train"): timings(1, 1, 1),
        ("ours", "floor train"): timings(0.5, 0.5, 0.5), ("stock", "eval"): [],
        ("ours", "eval"): timings(1, 3, 2), ("ours", "floor eval"): timings(1, 1, 1),
    }  # fmt: skip
    recipe = VALUES.model_copy(update={"classes": 3})
    train, evaluation, epoch = _speeds(recipe, "cpu", 3, found, {"train": 20, "eval": 30})
    assert train.stock == 20 / (1 + 4 * 2) and train.ours == 20 / (1 + 2) and train.data_wait_s == 1.0
    assert evaluation.stock is None and evaluation.over_stock is None  # its process had ended
    assert evaluation.ours == 30 / (1 + 6) and evaluation.of_floor == (30 / 7) / (30 / 4)
    assert epoch.stock is None and epoch.ours == 50 / (3 + 7) and epoch.data_wait_s == 2.5


def test_the_ways_train_on_the_same_images(images):
    index, data = images
    files = [
        tuple((index.root / s.path, s.label) for s in part) for part in (index.training, index.validation)
    ]
    task = BenchTask(
        bench_recipe(VALUES.model_copy(update={"augmentation": "center_crop"}), data), "cpu", data, *files
    )
    stock, ours = Stock(task), Ours(task)
    assert stock.measure("train", 0.0).images == 12  # three batches of four
    assert stock.measure("train", 99.0).images == 18  # as many as there are
    assert stock.measure("eval", 0.0).wait >= 0
    assert ours.measure("train", 0.0).images >= 12 and ours.measure("floor eval", 0.0).images >= 12
    from caltech_hpo.training.bench import StockImages, stock_transform

    pixels, label = StockImages(task.training, stock_transform(task.recipe, training=True))[5]
    (batch, labels), *_ = ours._prepared.training.in_batches_of(18).evaluation()
    assert labels[5] == label and (batch[5] - pixels).abs().max() < 0.01


def test_a_study_is_timed_in_a_database_of_its_own(images, tmp_path):
    index, _ = images
    place = Place(tmp_path / "home", "sqlite:///unused.db", index.root)
    request = SearchRequest("demo", 2, device="cpu", baselines=False)
    row = measure_study(request, place, seconds=60, progress=lambda *_: None)
    assert (row.study, row.workers, row.trials) == ("demo", 1, 2) and row.epochs >= 2
    assert not list((tmp_path / "home").rglob("*.db"))


def test_what_searching_costs_is_counted_on_thirty_epochs(tmp_path):
    shown = []
    found = measure_overhead(tmp_path, 5, lambda *count: shown.append(count))
    assert (found.trials, found.measured, found.epochs) == (5, 5, 30)
    assert found.ours_ms > 0 and found.optuna_ms > 0 and shown == [(n, 5) for n in range(1, 6)]
    assert not list(tmp_path.iterdir())


def test_simulated_workers_report_once_a_second_and_nothing_is_left(tmp_path):
    shown = []
    held = measure_reports(None, tmp_path, 20, 1.5, "random", lambda *what: shown.append(what))
    assert (held.database, held.sampler, held.workers, held.offered) == ("sqlite", "random", 20, 20.0)
    assert 21 <= held.trials <= 24  # the first one has a single epoch
    assert 0 < held.held <= 45  # a first report within a second, then one a second
    assert 0 <= held.sampling + held.writing + held.idle <= 1.05 and held.late >= 0
    assert shown and not list(tmp_path.iterdir())


def test_the_batch_is_what_stock_can_hold(monkeypatch):
    from caltech_hpo.training import system_memory as memory

    monkeypatch.setattr(memory, "free_memory", lambda device: 23 << 30)
    assert fitting_batch_size("alexnet", 224, "cpu") == 256
    assert fitting_batch_size("vgg16", 224, "cpu") == 64
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    assert fitting_batch_size("vgg16", 224, "cpu") == 16


def test_the_cache_is_timed_and_nothing_is_left(images, tmp_path):
    from caltech_hpo.search.bench_study import measure_cache

    index, _ = images
    load_search_data(index, 36, tmp_path)
    before = sorted(tmp_path.iterdir())
    found = measure_cache(index, 36, tmp_path, lambda *_: None)
    assert found.images == len(index.training) and found.open_seconds > 0
    assert found.per_core == found.images / found.seconds / found.cores
    assert sorted(tmp_path.iterdir()) == before


def test_the_commands_rows_and_table():
    from rich.console import Console

    from caltech_hpo.cli.bench_tables import rows_json, speed_table
    from caltech_hpo.search.bench import Speed
    from caltech_hpo.search.bench_study import CacheSpeed, Measurements, StudySpeed

    speeds = [
        Speed("alexnet", "train", 10.0, 40.0, 50.0, 0.5, 256, "cpu", 3),
        Speed("vgg16", "train", None, 2.0, 2.0, 0.1, 64, "cpu", 3),
    ]
    studies = [StudySpeed("alexnet-scratch", "alexnet", 2, 40, 500, 45.0, "cuda:0")]
    found = Measurements(speeds, studies, CacheSpeed(1000, 2, 1.25, 0.1))
    first, second, study, cache = rows_json(found)
    keys = {"model", "phase", "stock", "ours", "floor", "over_stock", "of_floor", "data_wait_s"}
    assert all(row.keys() >= keys for row in (first, second, study, cache))
    assert study["model"] == "alexnet" and cache["model"] is cache["ours"] is None
    assert (first["over_stock"], first["of_floor"]) == (4.0, 0.8) and second["over_stock"] is None
    assert (study["phase"], study["workers"]) == ("study", 2) and cache["per_core"] == 400
    console = Console(width=150, record=True)
    console.print(speed_table(found, "2 CPU cores"))
    text = console.export_text()
    for words in ("4.000", "0.800", "not run", "11.11", "decoding: 400 images", "0.10 s", "2 CPU cores"):
        assert words in text


def test_what_was_measured_is_kept_where_a_study_is_refused(images, tmp_path, monkeypatch, capsys):
    from caltech_hpo.cli.bench_runs import run_speed
    from caltech_hpo.cli.options import progress_bars
    from caltech_hpo.errors import StorageError
    from caltech_hpo.search import bench, bench_study

    def refused(request, place, **_):
        if request.workers == 1:
            raise StorageError("the disk is full", "make room")
        return bench_study.StudySpeed(request.study, "alexnet", request.workers, 3, 9, 1.0, request.device)

    measured = bench.Speed("resnet18", "train", 10.0, 40.0, 50.0, 0.5, 4, "cpu", 1)
    monkeypatch.setattr(bench, "measure_speed", lambda *_, **__: [measured])
    monkeypatch.setattr(bench_study, "measure_study", refused)
    place = Place(tmp_path, "sqlite:///unused.db", images[0].root)
    found = bench_study.Measurements()
    with progress_bars() as bars:
        run_speed(found, None, place, [VALUES], "cpu", 0.1, 1, 4, "1,2", False, bars)
    assert [row.ours for row in found.speeds] == [40.0] and found.cache.images == len(images[0].training)
    assert [row.workers for row in found.studies] == [2]
    assert found.lacking == ["alexnet-scratch with --workers 1"]
    said = capsys.readouterr().err
    assert "with --workers 1: the disk is full" in said
    assert "resnet18 train, images/s: 40.0, stock 10.0 (ours / stock 4.000), floor 50.0 (0.800)" in said


def test_what_was_measured_is_printed_when_it_is_ended(images, tmp_path, monkeypatch, capsys):
    import json

    from caltech_hpo.cli import bench_commands
    from caltech_hpo.search import bench

    def measured(recipe, *_, **__):
        if recipe.architecture == "alexnet":
            raise KeyboardInterrupt
        return [bench.Speed("resnet18", "train", 10.0, 40.0, 50.0, 0.5, 4, "cpu", 1)]

    monkeypatch.setattr(bench, "measure_speed", measured)
    with pytest.raises(typer.Exit) as stopped:
        bench_commands.bench(
            model=["resnet18", "alexnet"], device="cpu", batch_size=4, home=tmp_path, data=images[0].root,
            as_json=True, search=False, reporters=None, seconds=0.1, rounds=1, workers="", storage=None,
            study=None,
        )  # fmt: skip
    assert stopped.value.exit_code == 130
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["model"], row["over_stock"]) == ("resnet18", 4.0)


def test_what_could_not_be_measured_is_an_error_after_the_answer(images, tmp_path, monkeypatch, capsys):
    """A script that goes on with the numbers has to know that some are missing."""
    import json

    from caltech_hpo.cli import bench_commands
    from caltech_hpo.errors import CaltechHpoError
    from caltech_hpo.search import bench

    row = bench.Speed("resnet18", "train", None, 40.0, 50.0, 0.5, 4, "cpu", 1)
    monkeypatch.setattr(bench, "measure_speed", lambda *_, **__: [row])
    with pytest.raises(CaltechHpoError, match="not all could be measured: resnet18 train"):
        bench_commands.bench(
            model=["resnet18"], device="cpu", batch_size=4, home=tmp_path, data=images[0].root, as_json=True,
            search=False, reporters=None, seconds=0.1, rounds=1, workers="", storage=None, study=None,
        )  # fmt: skip
    measured, _cache = json.loads(capsys.readouterr().out)
    assert (measured["stock"], measured["ours"]) == (None, 40.0)
