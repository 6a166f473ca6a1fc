"""A trained model answers: predictions, exports and mistakes, on files that a short training wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_folders, write_image, write_study
from PIL import Image
from typer.testing import CliRunner

from caltech_hpo.cli.app import app
from caltech_hpo.data.dataset import scan
from caltech_hpo.data.decode import decode_image
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.errors import CaltechHpoError, DataError, UsageError, WeightsError
from caltech_hpo.results import export as exports
from caltech_hpo.results.mistakes import find_mistakes, surest_mistakes, write_mistakes
from caltech_hpo.results.predict import Chosen, find_model, image_files, predict
from caltech_hpo.search.inline import InlineExecutor
from caltech_hpo.search.messages import EpochDone, Finished, Job, WorkerConfig
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import open_storage, stored_study
from caltech_hpo.search.urls import default_url
from caltech_hpo.training.checkpoint import save_weights
from caltech_hpo.training.trained import DESCRIPTION, load_model, probabilities, read_trained

SHORT = {"learning_rate": 0.02, "batch_size": 8, "epochs": 12, "augmentation": "center_crop"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study whose best trial's weights a worker has written, on three classes that colours tell apart."""
    folder = tmp_path_factory.mktemp("use")
    images = write_folders(folder / "images", images=36)
    made = Place(folder / "home", default_url(folder / "home"), data=images)
    index = scan(images)
    write_study(made.storage, [([0.1, 0.9], SHORT)], data=index.fingerprint)
    (record,) = trial_records(stored_study(made.storage, "demo"))
    data = load_search_data(index, record.recipe.resize, made.cache)
    executor = InlineExecutor(WorkerConfig(data, "cpu", 1, record.recipe))
    executor.submit(Job(0, record.recipe, keep=made.best_weights / "demo-best-trial0.safetensors"))
    while not isinstance(event := executor.next_event(), Finished):
        if isinstance(event, EpochDone):
            executor.answer(0, True)
    executor.close()
    return made


def test_the_file_says_which_model_and_classes_it_holds(place):
    chosen = find_model("demo", place)
    assert chosen.words == "the search's best, trial 0, validation top-1 0.9000"
    assert chosen.model.classes == ("ant", "Bee", "cat") and chosen.model.recipe.epochs == 12
    assert find_model(None, place, chosen.model.weights).model == chosen.model
    assert chosen.model.description["preprocessing"]["center_crop"] == chosen.model.recipe.crop


def test_an_older_file_is_described_by_the_model_json_beside_it(place, tmp_path):
    trained = find_model("demo", place).model
    model = load_model(trained, torch.device("cpu"))
    save_weights(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="does not say which model"):
        read_trained(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(trained.description))
    assert read_trained(tmp_path).classes == trained.classes
    save_weights(model.state_dict(), tmp_path / "model.safetensors", {DESCRIPTION: "{"})
    with pytest.raises(WeightsError):
        read_trained(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"no")
    for path in (tmp_path / "other.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(WeightsError, match=path.name):
            read_trained(path)


def test_predictions_are_right_and_faulty_files_are_named(place, tmp_path):
    trained = find_model("demo", place).model
    new = [write_image(tmp_path / f"{hue}.png", 77 + hue, hue=hue) for hue in range(3)]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "note.txt").write_text("ignored")
    write_image(tmp_path / "deep" / "er.png", 5, hue=1)
    files = image_files([*new, tmp_path])
    assert [file.name for file in files] == [
        "0.png", "1.png", "2.png", "0.png", "1.png", "2.png", "broken.jpg", "er.png",
    ]  # fmt: skip
    made = list(predict(trained, files, device="cpu", top=2))
    right = ["ant", "Bee", "cat"]
    assert [one.classes[0] for one in made if not one.problem] == [*right, *right, "Bee"]
    assert [one.file for one in made if one.problem] == [str(tmp_path / "broken.jpg")]
    for one in made:
        shares = one.probabilities
        assert one.problem or (len(shares) == 2 and 1 >= shares[0] >= shares[1] >= 0 and sum(shares) <= 1.001)
    for missing in (tmp_path / "none.jpg", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=missing.name):
            image_files([missing])


def test_probabilities_are_those_of_the_training_loops_batches(place):
    trained = find_model("demo", place).model
    pixels = [decode_image(path, trained.recipe.resize) for path in sorted(place.data.rglob("*.png"))[:5]]
    device = torch.device("cpu")
    model = load_model(trained, device)
    plain = probabilities(model, trained.recipe, pixels, device)
    assert plain.shape == (5, 3) and torch.allclose(plain.sum(1), torch.ones(5), atol=1e-5)
    flip = trained.recipe.model_copy(update={"test_time_flip": True})
    mirrored = probabilities(
        model, trained.recipe, [np.ascontiguousarray(p[:, ::-1]) for p in pixels], device
    )
    both = probabilities(model, flip, pixels, device)
    assert torch.allclose(both, (plain + mirrored) / 2, atol=0.02)  # a crop's corner is rounded down
    assert probabilities(model, flip, [], device).shape == (0, 3)


def test_damaged_and_hostile_models_are_refused(place, tmp_path):
    trained = find_model("demo", place).model
    state = load_model(trained, torch.device("cpu")).state_dict()
    good = json.dumps(trained.description)
    evil = json.dumps(trained.description | {"classes": ["ant", "Bee", "\x1b]0;pwned\x07"]})
    head = next(name for name in state if name.endswith("fc.weight"))
    cases = {
        "not numbers": (state | {head: torch.full_like(state[head], torch.nan)}, good),
        "not weights": (state | {head: state[head].to(torch.int64)}, good),
        "does not say": (state, "[" * 100_000),
        "control characters": (state, evil),
    }
    image = write_image(tmp_path / "new.png", 1)
    for words, (tensors, about) in cases.items():
        path = tmp_path / f"{words}.safetensors"
        save_weights(tensors, path, {DESCRIPTION: about})
        with pytest.raises(WeightsError, match=words):
            list(predict(read_trained(path), [image], device="cpu"))


def test_what_a_deleted_study_left_is_not_the_next_ones(place, tmp_path):
    home = shutil.copytree(place.home, tmp_path / "home")
    copy = Place(home, default_url(home), place.data)
    storage = open_storage(copy.storage)
    storage.delete_study(storage.get_study_id_from_name("demo"))
    write_study(copy.storage, [([0.1, 0.8], SHORT)], data="other images")
    with pytest.raises(UsageError, match="has left no weights"):
        find_model("demo", copy)


def test_a_study_without_weights_says_how_to_get_them(tmp_path):
    place = Place(tmp_path, default_url(tmp_path))
    write_study(place.storage, [([0.5], SHORT)])
    with pytest.raises(UsageError, match="has left no weights"):
        find_model("demo", place)
    with pytest.raises(UsageError, match="which model"):
        find_model(None, place)


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_an_exported_model_gives_the_same_answers(place, tmp_path, kind):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    trained = find_model("demo", place).model
    made = exports.export(trained, kind, tmp_path / f"demo{exports.SUFFIXES[kind]}")
    assert (
        made.largest_difference < 1e-3
        and made.images == 4
        and made.description["classes"] == [*trained.classes]
    )
    assert [path.name for path in tmp_path.iterdir()] == [made.file.name]
    pixels = Image.open(write_image(tmp_path / "new.png", 3, hue=2)).resize((trained.recipe.crop,) * 2)
    images = torch.from_numpy(np.asarray(pixels, dtype=np.float32).transpose(2, 0, 1)[None] / 255)
    run = exports._run_onnx if kind == "onnx" else exports._run_torch
    assert trained.classes[int(run(made.file, images).argmax())] == "cat"
    if kind == "onnx":
        import onnx

        properties = {entry.key: entry.value for entry in onnx.load(made.file).metadata_props}
        assert json.loads(properties["classes"]) == [*trained.classes]


def test_an_export_that_answers_otherwise_is_not_kept(place, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "_run_torch", lambda file, pixels: torch.zeros(len(pixels), 3))
    with pytest.raises(CaltechHpoError, match="answers otherwise"):
        exports.export(find_model("demo", place).model, "torch-export", tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_the_surest_mistakes_come_first():
    shares = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]], dtype=np.float32)
    assert surest_mistakes(shares, np.array([1, 1, 0, 1])) == [0, 3, 2]


def test_mistakes_on_the_validation_images_make_a_page(place, tmp_path):
    chosen = find_model("demo", place)
    found = find_mistakes("demo", place, chosen, device="cpu")
    assert found.mistakes.images == len(scan(place.data).validation)
    wrong = round((1 - found.mistakes.top1) * found.mistakes.images)
    assert len(found.mistakes.surest) == wrong == sum(one.count for one in found.mistakes.confused)
    # a model that takes everything for the first class
    trained = chosen.model
    state = load_model(trained, torch.device("cpu")).state_dict()
    head = [name for name in state if name.startswith("fc.")]
    blind = {name: torch.zeros_like(value) if name in head else value for name, value in state.items()}
    about = {DESCRIPTION: json.dumps(trained.description)}
    save_weights(blind, tmp_path / "blind.safetensors", about)
    blinded = find_model(None, place, tmp_path / "blind.safetensors")
    made = find_mistakes("demo", place, blinded, device="cpu", most=3)
    images = made.mistakes.images
    assert made.mistakes.top1 == pytest.approx(1 / 3, abs=0.05) and len(made.pictures) == 3
    assert {(one.truth, one.predicted) for one in made.mistakes.confused} == {("Bee", "ant"), ("cat", "ant")}
    assert [score.accuracy for score in made.mistakes.classes] == [0.0, 0.0, 1.0]
    text = write_mistakes(made, tmp_path / "page" / "errors.html").read_text()
    assert text.count("data:image/webp;base64,") == 3 and f"{images:,}" in text and "Bee" in text


def test_a_model_that_has_learned_the_validation_images_is_refused(place):
    chosen = find_model("demo", place)
    recipe = chosen.model.recipe.model_copy(update={"fit_on": "train+val"})
    both = type(chosen.model)(chosen.model.weights, recipe, chosen.model.classes)
    with pytest.raises(UsageError, match="knows them"):
        find_mistakes("demo", place, Chosen(both, "x"))


def test_a_model_of_another_split_is_refused(place):
    """It may have learned these validation images."""
    chosen = find_model("demo", place)
    recipe = chosen.model.recipe.model_copy(update={"data": "another"})
    other = type(chosen.model)(chosen.model.weights, recipe, chosen.model.classes)
    with pytest.raises(DataError, match="images, classes or split"):
        find_mistakes("demo", place, Chosen(other, "x"))
    without = chosen.model.recipe.model_copy(update={"data": f"{chosen.model.recipe.data}-without2"})
    some = type(chosen.model)(chosen.model.weights, without, chosen.model.classes)
    assert find_mistakes("demo", place, Chosen(some, "x"), device="cpu").mistakes.images


def test_mistakes_are_those_of_one_view(place):
    """A test-time flip is another accuracy, and has columns of its own elsewhere."""
    chosen = find_model("demo", place)
    recipe = chosen.model.recipe.model_copy(update={"test_time_flip": True})
    flipping = type(chosen.model)(chosen.model.weights, recipe, chosen.model.classes)
    plain = find_mistakes("demo", place, chosen, device="cpu", most=100).mistakes
    assert (
        find_mistakes("demo", place, Chosen(flipping, chosen.words), device="cpu", most=100).mistakes == plain
    )


def test_the_commands_answer(place, tmp_path):
    def answer(*arguments, code=0):
        done = CliRunner().invoke(app, [*map(str, arguments), "--home", str(place.home), "--json"])
        if code:
            assert done.exception is not None and done.exception.exit_code == code
        else:
            assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    image = write_image(tmp_path / "new.png", 12, hue=1)
    shown = answer("predict", image, "--study", "demo", "--top", 1)
    assert [one["classes"] for one in shown["images"]] == [["Bee"]]
    (tmp_path / "broken.png").write_bytes(b"x")
    shown = answer("predict", image, tmp_path / "broken.png", "--model", shown["model"], code=3)
    assert [bool(one["problem"]) for one in shown["images"]] == [False, True]
    found = answer("errors", "--study", "demo", "--data", place.data)
    assert found["images"] == len(scan(place.data).validation) and Path(found["page"]).is_file()
    made = answer("export", "--study", "demo", "--format", "torch-export", "--output", tmp_path / "demo.pt2")
    assert made["classes"] == ["ant", "Bee", "cat"] and Path(made["file"]).is_file()
    command = ["export", "--study", "demo", "--output", made["file"], "--home", str(place.home)]
    with pytest.raises(UsageError, match="is there already"):
        CliRunner().invoke(app, command, catch_exceptions=False)
