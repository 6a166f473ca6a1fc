"""The installed command as a user types it: from search to final on the demo, and what wrong input gets."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import urllib.request

import pytest
import torch
from commands import COMMAND, answer, call, environment, here
from helpers import write_folders

from caltech_hpo.data.dataset import scan


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder in which the demo's study was searched, on images that are quickly learned."""
    folder = tmp_path_factory.mktemp("demo")
    write_folders(folder / "images", images=60)
    done = call("search", "--study", "demo", "--data", "images", "--trials", 2, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_search_answers_and_shows_its_progress(searched):
    folder, document, messages = searched
    assert document["study"] == "demo" and document["finished"] == document["trials"] == 2
    assert document["complete"] + document["pruned"] == 2
    assert set(document["best"]["params"]) == {"learning_rate", "batch_size", "epochs", "augmentation"}
    assert 0.6 < document["best"]["val_accuracy"] <= 1
    assert (folder / "storage" / "studies.db").exists()
    for words in ("trial 0 starts", "trial 0 epoch 1/", "loss", "validation", "best of", "left", "baseline"):
        assert words in messages
    assert "2 trials in about" in messages and "80% likely" in messages
    assert messages.index("2 trials in about") < messages.index("trial 0 starts")


def test_the_same_command_again_does_nothing(searched):
    folder, document, _ = searched
    done = here("search", "--study", "demo", "--data", "images", "--trials", 2, "--json", cwd=folder)
    assert json.loads(done.stdout) == document
    assert "nothing to do" in done.stderr
    home = f"--home={folder / 'storage'}"
    fewer = here("search", "--study", "demo", home, "--data", "images", "--trials", 1, cwd=folder)
    assert "2 trials finished (asked: 1): " in fewer.stdout and fewer.returncode == 0
    place = f"--home {folder / 'storage'}"  # what is to be typed next looks there too
    assert f"confirm --study demo {place} --data images, then final; " in fewer.stdout
    assert fewer.stdout.endswith(f"caltech-hpo dashboard {place}\n")


def test_a_plan_of_what_is_there_times_nothing(searched):
    folder, *_ = searched
    planned = ("plan", "--study", "demo", "--data", "images", "--trials", 2)
    done = here(*planned, "--json", cwd=folder)
    document = json.loads(done.stdout)
    assert (document["remaining"], document["seconds"], document["kinds"]) == (0, 0.0, [])
    assert document["finished"] == 2 and document["memory"] is document["disk"] is None
    assert "starting a worker" not in done.stderr
    assert here(*planned, cwd=folder).stdout == "no trials to come: 2 are finished already (asked: 2)\n"


def test_final_scores_the_test_set_once(searched):
    folder, document, _ = searched
    first = answer("final", "--study", "demo", "--data", "images", cwd=folder, run=here)
    for key in (
        "study", "trial", "params", "best_epoch", "val_accuracy", "test_accuracy",
        "test_mean_per_class_accuracy", "test_images", "ci95", "fit_on", "model",
    ):  # fmt: skip
        assert key in first
    assert first["trial"] == document["best"]["trial"] and first["params"] == document["best"]["params"]
    # On one machine, the same recipe gives the same training: the search's accuracy, its best epoch kept.
    assert first["val_accuracy"] == pytest.approx(document["best"]["val_accuracy"], abs=0.02)
    assert first["test_images"] == 60 and first["test_accuracy"] > 0.6
    low, high = first["ci95"]
    assert low < first["test_accuracy"] <= high
    model = folder / first["model"]
    names = {path.name for path in model.parent.iterdir()}
    assert names == {"model.safetensors", "model.json", "metrics.json", "curves.png", "confusion.png"}
    stamp = model.stat().st_mtime_ns
    again = here("final", "--study", "demo", "--json", cwd=folder)
    assert json.loads(again.stdout) == first and "not used again" in again.stderr
    assert model.stat().st_mtime_ns == stamp


def test_the_written_model_can_be_rebuilt_from_its_files_alone(searched):
    folder, *_ = searched
    result = answer("final", "--study", "demo", "--data", "images", cwd=folder, run=here)
    code = """
import json, sys, torch, numpy as np
from pathlib import Path
from PIL import Image
from safetensors.torch import load_file
from torchvision import models, transforms
folder, images = Path(sys.argv[1]), Path(sys.argv[2])
made = json.loads((folder / "model.json").read_text())
model = models.get_model(made["architecture"], num_classes=len(made["classes"]))
model.load_state_dict(load_file(folder / "model.safetensors"))
p = made["preprocessing"]
t = transforms.Compose([transforms.Resize(p["resize_short_side"]), transforms.CenterCrop(p["center_crop"]),
                        transforms.ToTensor(), transforms.Normalize(p["mean"], p["std"])])
paths = sorted(images.glob("*/*.png"), key=lambda path: (path.parent.name.lower(), path.name))[0::3]
batch = torch.stack([t(Image.open(path).convert("RGB")) for path in paths])
with torch.inference_mode():
    found = model.eval()(batch).argmax(1).tolist()
print(np.mean([made["classes"][i] == path.parent.name for i, path in zip(found, paths)]))
"""
    arguments = [sys.executable, "-c", code, str((folder / result["model"]).parent), "images"]
    done = subprocess.run(
        arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert float(done.stdout) == pytest.approx(result["test_accuracy"], abs=0.01), (
        done.stderr
    )  # fp32 against bf16


def test_report_shows_the_test_score_beside_the_trial(searched):
    folder, document, _ = searched
    result = answer("final", "--study", "demo", "--data", "images", cwd=folder, run=here)
    made = answer("report", "--study", "demo", cwd=folder, run=here)
    assert made["best"] == document["best"]["trial"]
    scored = [row for row in made["rows"] if row["test_accuracy"] is not None]
    assert [(row["trial"], row["test_accuracy"]) for row in scored] == [
        (result["trial"], result["test_accuracy"])
    ]
    assert made["rows"][0]["baseline"].startswith("by hand")
    assert (folder / made["curves"]).stat().st_size > 10_000
    assert f"{result['test_accuracy']:.4f}" in here("report", "--study", "demo", cwd=folder).stdout


def test_final_on_training_and_validation_images_is_another_use_of_the_test_set(searched):
    folder, document, _ = searched
    answer("final", "--study", "demo", "--data", "images", cwd=folder, run=here)
    arguments = ("final", "--study", "demo", "--data", "images", "--fit-on", "train+val")
    refused = here(*arguments, cwd=folder)
    assert refused.returncode == 2 and refused.stdout == "" and "epoch 1/" not in refused.stderr
    assert "was used before" in refused.stderr and '--again "reason"' in refused.stderr
    made = answer(*arguments, "--again", "what more images give", cwd=folder, run=here)
    assert made["fit_on"] == "train+val" and made["val_accuracy"] is None
    assert made["best_epoch"] == document["best"]["best_epoch"] and 0 < made["test_accuracy"] <= 1
    report = answer("report", "--study", "demo", cwd=folder, run=here)
    assert report["test_uses"] == len(report["finals"]) >= 2
    assert report["test_reasons"] == ["what more images give"]
    shown = " ".join(here("report", "--study", "demo", cwd=folder).stdout.split())
    assert "again because: what more images give" in shown


def test_studies_lists_what_is_declared_and_what_is_there(searched):
    folder, document, _ = searched
    rows = {row["study"]: row for row in answer("studies", cwd=folder, run=here)}
    assert rows["demo"]["finished"] == 2 and rows["demo"]["best"]["trial"] == document["best"]["trial"]
    assert rows["alexnet-scratch"]["finished"] == 0 and rows["alexnet-scratch"]["best"] is None
    shown = here("studies", "show", "alexnet-scratch", cwd=folder).stdout
    for words in ("learning_rate", "0.001 to 0.1, log", "median", "LR 0.05, 50 epochs, step 35", "0.540"):
        assert words in shown


def test_the_dashboard_serves_the_study(searched):
    folder, document, _ = searched
    command = [COMMAND, "dashboard", "--port", "0"]
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            line = next(line for line in server.stderr if "http://" in line)
            url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
            with urllib.request.urlopen(f"{url}api/studies", timeout=30) as reply:
                studies = json.load(reply)
            summaries = studies.get("study_summaries") or studies
            assert [study["study_name"] for study in summaries] == ["demo"]
            with urllib.request.urlopen(f"{url}api/studies/{summaries[0]['study_id']}", timeout=30) as reply:
                assert len(json.load(reply)["trials"]) == document["finished"]
            with urllib.request.urlopen(f"{url}dashboard", timeout=30) as reply:
                assert b"<html" in reply.read().lower()
            taken = here("dashboard", "--port", url.rstrip("/").rsplit(":", 1)[1], cwd=folder)
            assert taken.returncode == 2 and "cannot listen" in taken.stderr
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=20) == 130
        finally:
            server.kill()


def test_a_changed_study_is_refused_before_any_trial(searched, tmp_path):
    folder, *_ = searched
    (tmp_path / "studies").mkdir()
    from caltech_hpo.study_files import study_files

    text = study_files()["demo"].read_text()
    (tmp_path / "studies" / "demo.toml").write_text(text.replace("high = 0.5", "high = 0.4"))
    done = here("search", "--study", "demo", "--trials", 9, "--home", folder / "storage", cwd=tmp_path)
    assert done.returncode == 2
    assert "space.learning_rate.high: 0.5 -> 0.4" in done.stderr and "--study demo@2" in done.stderr


def test_a_smoke_run_keeps_nothing_and_unreadable_images_can_be_left_out(tmp_path):
    images = write_folders(tmp_path / "images", images=12)
    (images / "ant" / "image_001.png").write_bytes(b"no image")
    document = answer(
        "search", "--study", "demo", "--smoke", "--skip-unreadable", "--data", images,
        "--home", tmp_path / "home", cwd=tmp_path, run=here,
    )  # fmt: skip
    assert document["smoke"] and document["finished"] == 2
    assert not (tmp_path / "home").exists()


def test_two_homes_on_one_database_cannot_search_a_study_at_once(tmp_path):
    from caltech_hpo.search.locks import study_lock

    write_folders(tmp_path / "images", images=12)
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    with study_lock(
        storage, tmp_path / "one", "demo", "search on study 'demo'"
    ):  # as a search of home one does
        second = here(*SEARCH, "--storage", storage, "--home", "two", cwd=tmp_path)
    assert second.returncode == 4 and "another search on study 'demo'" in second.stderr


def test_the_score_is_the_databases_and_needs_neither_home_nor_data(searched, tmp_path):
    folder, *_ = searched
    first = answer("final", "--study", "demo", "--data", "images", cwd=folder, run=here)
    storage = f"sqlite:///{folder / 'storage' / 'studies.db'}"
    again = here("final", "--study", "demo", "--storage", storage, "--data", "absent", "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == {**first, "model": None} and "no longer in" in again.stderr


def test_an_unreadable_test_image_is_found_before_training(searched, tmp_path):
    images = shutil.copytree(searched[0] / "images", tmp_path / "images")
    with sqlite3.connect(searched[0] / "storage" / "studies.db") as source:
        (tmp_path / "home").mkdir()
        with sqlite3.connect(tmp_path / "home" / "studies.db") as copy:
            source.backup(copy)
            copy.execute("DROP TABLE IF EXISTS final_scores")  # of another test
        copy.close()
    source.close()
    arguments = ("--study", "demo", "--data", "images", "--home", "home")
    bad = images / scan(images).test[0].path
    bad.write_bytes(bytes(bad.stat().st_size))  # of the same size: only decoding can tell
    done = here("final", *arguments, cwd=tmp_path)
    assert done.returncode == 3 and str(bad.name) in done.stderr and "epoch 1/" not in done.stderr
    bad.write_bytes(b"shorter")
    done = here("final", *arguments, cwd=tmp_path)
    assert done.returncode == 3 and "not the data that study 'demo' searched on" in done.stderr


def test_models_side_by_side(tmp_path):
    rows = answer("models", cwd=tmp_path, run=here)
    assert {"alexnet", "resnet18", "vgg16"} <= {row["architecture"] for row in rows}
    assert "BasicBlock" in here("models", "show", "resnet18", cwd=tmp_path).stdout


def test_data_check_finds_faults(tmp_path):
    images = write_folders(tmp_path / "images")
    document = answer("data", "check", "--data", images, cwd=tmp_path, run=here)
    assert len(document["classes"]) == 3 and document["unreadable"] == {}
    (images / "ant" / "image_001.png").write_bytes(b"no image")
    faulty = here("data", "check", "--data", images, "--json", cwd=tmp_path)
    assert faulty.returncode == 3
    assert list(json.loads(faulty.stdout)["unreadable"]) == ["training: ant/image_001.png"]


# The folder that each case runs in, and what it does to it first.
def nothing(folder):
    """The demo images alone."""


def bad_toml(folder):
    (folder / "studies").mkdir()
    (folder / "studies" / "mine.toml").write_text("[recipe\n")


def empty_class(folder):
    (folder / "images" / "dog").mkdir()


def unreadable(folder):
    (folder / "images" / "ant" / "image_001.png").write_bytes(b"no image")


def split_lists(train, test="cat/image_008.png"):
    def write(folder):
        names = [f"{name}/image_{n:03d}.png" for name in ("ant", "Bee", "cat") for n in range(2)]
        (folder / "images" / "train.txt").write_text("\n".join([*names, train]))
        (folder / "images" / "test.txt").write_text(test)

    return write


def no_database(folder):
    (folder / "storage").mkdir()
    (folder / "storage" / "studies.db").write_text("my notes\n" * 100)


def empty_database(folder):
    (folder / "storage").mkdir()
    (folder / "storage" / "studies.db").touch()


SEARCH = ("search", "--study", "demo", "--trials", "1", "--data", "images")
WRONG = {
    "unknown study": (nothing, ("search", "--study", "demmo"), 2, "did you mean 'demo'"),
    "bad TOML": (bad_toml, ("search", "--study", "mine"), 2, "mine.toml: not valid TOML"),
    "no trials": (nothing, ("search", "--study", "demo", "--trials", "0"), 2, "--trials"),
    "no such option": (nothing, ("search", "--study", "demo", "--trails", "3"), 2, "--trails"),
    "no study": (nothing, ("search",), 2, "--study"),
    "no such device": (nothing, (*SEARCH, "--device", "gpu"), 2, "use one of: auto, cpu"),
    "odd precision": (nothing, (*SEARCH, "--precision", "fp16"), 2, "fp16"),
    "odd queue": (nothing, (*SEARCH, "--enqueue", "learning_rate"), 2, "NAME=VALUE"),
    "missing data": (nothing, (*SEARCH[:-1], "absent"), 3, "absent: there is no such folder"),
    "empty class": (empty_class, SEARCH, 3, "without an image: 'dog'"),
    "unreadable": (unreadable, SEARCH, 3, "ant/image_001.png"),
    "missing file": (
        split_lists("ant/absent.png"),
        SEARCH,
        3,
        "ant/absent.png names an image that is not there",
    ),
    "leaving file": (split_lists("../a.png"), SEARCH, 3, "../a.png leaves the image folder"),
    "both lists": (split_lists("cat/image_008.png"), SEARCH, 3, "is also in train.txt"),
    "missing weights": (nothing, (*SEARCH, "--weights", "w.pth"), 3, "w.pth: there is no such weights file"),
    "before the sub-command": (nothing, ("studies", "--home", "x", "show", "demo"), 2, "write them behind"),
    "odd storage": (nothing, (*SEARCH, "--storage", "nonsense"), 4, "sqlite:///FILE"),
    "closed storage": (nothing, (*SEARCH, "--storage", "sqlite:////proc/none/a.db"), 4, "/proc/none"),
    "no database": (no_database, SEARCH, 4, "studies.db: is no usable SQLite database"),
    "empty database": (empty_database, SEARCH, 4, "studies.db: is empty"),
    "final too early": (nothing, ("final", "--study", "demo"), 2, "caltech-hpo search --study demo"),
    "report too early": (nothing, ("report", "--study", "demo"), 2, "is not in the database"),
    "final of nothing": (nothing, ("final", "--study", "dmo"), 2, "did you mean 'demo'"),
    "report of nothing": (nothing, ("report", "--study", "dmo"), 2, "did you mean 'demo'"),
    "no such model": (nothing, ("models", "show", "lenet"), 2, "known: alexnet"),
    "no archive": (nothing, ("data", "fetch", "--archive", "a.zip"), 3, "a.zip"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_clear_error(case, tmp_path):
    prepare, arguments, code, words = WRONG[case]
    write_folders(tmp_path / "images")
    prepare(tmp_path)
    done = here(*arguments, cwd=tmp_path)
    message = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == code, done.stderr
    assert words in message
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_without_data_or_network_the_three_ways_out_are_named(tmp_path):
    # An unreachable proxy stands for a machine without a network.
    done = here(
        "search", "--study", "alexnet-scratch", "--trials", 1, cwd=tmp_path, https_proxy="http://127.0.0.1:9"
    )
    assert done.returncode == 3
    assert "fetching Caltech-101" in done.stderr
    for way in ("data fetch", "--archive FILE", "--data DIR"):
        assert way in done.stderr


def test_without_imagenet_weights_or_network_the_file_is_named(tmp_path):
    write_folders(tmp_path / "images")
    done = here(
        "search", "--study", "alexnet-transfer", "--trials", 1, "--data", "images", cwd=tmp_path,
        TORCH_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 3
    assert str(tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth") in done.stderr
    assert "https://" in done.stderr and "--weights FILE" in done.stderr


def test_a_transfer_study_runs_on_weights_in_torchvisions_cache(tmp_path):
    from torchvision import models

    write_folders(tmp_path / "images", images=3)
    weights = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    weights.parent.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), weights)
    document = answer(
        "search", "--study", "resnet18-transfer", "--smoke", "--data", "images", cwd=tmp_path, run=here,
        TORCH_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9",
    )  # fmt: skip
    assert document["finished"] == 2


def test_a_smoke_run_on_the_real_images(caltech101, tmp_path):
    document = answer(
        "search", "--study", "lite0-head", "--smoke", "--data", caltech101, cwd=tmp_path, run=here
    )
    assert document["smoke"] and document["finished"] == 2
    assert 0.3 < document["best"]["val_accuracy"] < 0.95  # ImageNet's features, 300 images, two epochs


def test_reading_commands_make_no_database(tmp_path):
    assert call("studies", cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_database_is_optunas(searched):
    folder, *_ = searched
    copy = shutil.copy(folder / "storage" / "studies.db", folder / "copy.db")
    with sqlite3.connect(copy) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT study_name FROM studies").fetchall() == [("demo",)]


def test_help_lists_every_command(tmp_path):
    shown = call("--help", cwd=tmp_path).stdout
    for command in (
        "init", "search", "confirm", "final", "report", "dashboard", "studies", "data", "models", "predict",
        "export", "errors", "submit", "serve", "status", "cancel", "storage", "plan", "bench", "replay",
    ):  # fmt: skip
        assert command in shown
