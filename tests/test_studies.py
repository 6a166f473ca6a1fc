"""Study files: what is built in, what is refused, and that a spec knows its space."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltech_hpo.errors import SpecError, UsageError
from caltech_hpo.ranges import Choices, FloatRange, IntRange
from caltech_hpo.search.request import with_own_sizes
from caltech_hpo.spec import Hyperparameters, Recipe
from caltech_hpo.study_checks import warnings_of, without_effect
from caltech_hpo.study_files import complete_params, load_study, parse_study, read_study, study_files

BUILT_IN = {
    "lite0-transfer",
    "lite0-head",
    "alexnet-scratch-modern",
    "demo",
    "alexnet-scratch",
    "alexnet-transfer",
    "alexnet-freeze",
    "alexnet-augment",
    "resnet18-transfer",
    "resnet18-scratch",
    "vgg16-transfer",
}
MINIMAL = """
[recipe]
architecture = "resnet18"
[space]
learning_rate = { low = 0.001, high = 0.1, log = true }
"""
ROW = '\n[[baselines]]\nname = "a"\n'


def parse(text: str):
    return parse_study(tomllib.loads(text), name="mine", source="studies/mine.toml")


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_studies_load_and_say_how_to_run_them(name):
    spec = load_study(name)
    assert f"caltech-hpo search --study {name}" in spec.about
    assert not warnings_of(spec)
    for row in spec.baselines:
        params = complete_params(spec, row.params)
        assert all(spec.space[key].contains(value) for key, value in params.items())


def test_the_reports_rows_are_all_there():
    rows = {name: len(load_study(name).baselines) for name in BUILT_IN}
    assert rows["alexnet-scratch"] == 6
    assert rows["alexnet-transfer"] == 7
    assert rows["alexnet-freeze"] == 3
    assert rows["alexnet-augment"] == 4
    assert rows["resnet18-transfer"] == rows["vgg16-transfer"] == 1
    published = {row.name: row.published for row in load_study("alexnet-scratch").baselines}
    assert published["LR 0.05, 50 epochs, step 35"].test == 0.54


def test_the_scratch_pruner_survives_the_plateau():
    assert load_study("alexnet-scratch").pruner.warmup_epochs > 9


def test_studies_in_the_current_folder_add_and_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "mine.toml").write_text(MINIMAL)
    (tmp_path / "studies" / ".#mine.toml").write_text("an editor's lock file")
    (tmp_path / "studies" / "demo.toml").write_text("# my own demo\n" + MINIMAL)
    assert set(study_files()) == BUILT_IN | {"mine"}
    assert load_study("demo").about == "my own demo"
    assert load_study("mine@2").name == "mine"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alexnet-scrach", "did you mean 'alexnet-scratch'"),
        ("zzz", "caltech-hpo studies"),
        ("../demo", "is no study name"),
        ("", "is no study name"),
        ("a" * 101, "is no study name"),
        ("[bold]", "is no study name"),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        load_study(name)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", ["recipe: missing"]),
        ('[recipe]\narchitecture = "alexnet"', ["space: nothing to search"]),
        ("colour = 1\n" + MINIMAL, ["colour: unknown section"]),
        ('data = "imagenet"\n' + MINIMAL, ["data: 'imagenet' is not one of"]),
        ('[recipe]\narchitecture = "vgg"\nbatch_size = 0', ["recipe.architecture", "recipe.batch_size"]),
        ('[recipe]\narchitecture = "alexnet"\ncrop = 300', ["recipe: crop 300 is larger than resize 256"]),
        ('[recipe]\narchitecture = "alexnet"\ncrop = 32\nresize = 40', ["alexnet needs at least 63"]),
        (MINIMAL + "lr = { low = 1, high = 2 }", ["space.lr: cannot be searched"]),
        (MINIMAL + "epochs = 5", ["space.epochs: write {"]),
        (MINIMAL + "epochs = { low = 9, high = 5 }", ["space.epochs: low 9 must be below high 5"]),
        (MINIMAL + "epochs = { low = 1, high = 6, step = 2 }", ["not low 1 plus a multiple of step 2"]),
        (MINIMAL + "epochs = { low = 0, high = 6 }", ["space.epochs.low"]),
        (MINIMAL + "momentum = { low = 0.5, high = 1.5 }", ["space.momentum.high"]),
        (MINIMAL + "mixup = { low = 0.0, high = 0.4 }", ["space.mixup.low: draws between 0 and 0.01"]),
        (MINIMAL + 'freeze = { choices = ["all"] }', ["space.freeze.choices[0]"]),
        (MINIMAL + "freeze = { choices = [] }", ["space.freeze.choices"]),
        (MINIMAL + 'freeze = { low = 1, high = 2 }', ["space.freeze: needs { choices"]),
        (MINIMAL + '[sampler]\nname = "grid"', ["sampler.name"]),
        (MINIMAL + '[pruner]\nwarmup = 3', ["pruner.warmup"]),
        (MINIMAL + ROW + "params = { learning_rate = 5.0 }", ["baselines[0].params.learning_rate"]),
        (MINIMAL + ROW + "params = { epochs = 5 }", ["baselines[0].params.epochs: not in [space]"]),
        (
            MINIMAL + "epochs = { low = 2, high = 4 }" + ROW + "params = { }",
            ["recipe.epochs = 30 is outside the space"],
        ),
    ],
)  # fmt: skip
def test_every_error_is_named_with_its_key(text, lines):
    with pytest.raises(SpecError) as raised:
        parse(text)
    message = str(raised.value)
    assert message.startswith("studies/mine.toml: ")
    for line in lines:
        assert line in message


def test_all_errors_come_at_once():
    text = (
        'x = 1\n[recipe]\narchitecture = "vgg"\n[space]\nlr = 3\n[sampler]\nname = "?"\n[pruner]\nname = "?"'
    )
    with pytest.raises(SpecError, match=r"5 error\(s\)"):
        parse(text)


def test_a_faulty_dimension_is_not_blamed_on_the_rows_that_use_it():
    text = '[recipe]\narchitecture = "alexnet"\n[space]\nepochs = { low = 9, high = 5 }'
    with pytest.raises(SpecError, match=r"1 error\(s\)"):
        parse(text + ROW + "params = { epochs = 5 }")


def test_bad_toml_names_the_file_and_the_line(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[recipe]\narchitecture = alexnet\n")
    with pytest.raises(SpecError, match=r"broken\.toml: not valid TOML: .*line 2"):
        read_study(path)


def test_hashes_follow_content_not_names():
    spec = parse(MINIMAL)
    assert spec.hash == spec.model_copy(update={"name": "other", "about": "words"}).hash
    changed = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"epochs": 31})})
    assert spec.hash != changed.hash
    recipe = Recipe(architecture="alexnet", classes=3, data="x")
    assert recipe.hash == Recipe.model_validate_json(recipe.model_dump_json()).hash
    reseeded = recipe.model_copy(update={"seed": 1})
    assert recipe.hash != reseeded.hash and recipe.configuration == reseeded.configuration
    assert recipe.configuration != recipe.model_copy(update={"epochs": 31}).configuration


@given(low=st.integers(1, 50), steps=st.integers(1, 20), step=st.integers(1, 7), value=st.integers(0, 250))
def test_an_integer_range_holds_its_grid_and_nothing_else(low, steps, step, value):
    dimension = IntRange(low=low, high=low + steps * step, step=step)
    assert dimension.contains(value) == (value in range(low, low + steps * step + 1, step))


@given(st.floats(1e-6, 1.0), st.floats(1.0001, 10.0), st.floats(-1, 20))
def test_a_float_range_holds_its_ends(low, high, value):
    dimension = FloatRange(low=low, high=high, log=True)
    assert dimension.contains(low) and dimension.contains(high)
    assert dimension.contains(value) == (low <= value <= high)


def test_longest_training():
    recipe = Hyperparameters(architecture="alexnet", epochs=7)
    spec = parse(MINIMAL).model_copy(update={"recipe": recipe})
    assert spec.most_epochs == 7
    assert spec.model_copy(update={"space": {"epochs": IntRange(low=3, high=9)}}).most_epochs == 9
    assert spec.model_copy(update={"space": {"epochs": Choices(choices=(3, 5))}}).most_epochs == 5


def test_a_study_may_name_its_model(tmp_path):
    text = MINIMAL.replace('architecture = "resnet18"', 'model = "timm/resnet26"')
    assert text != MINIMAL
    (tmp_path / "mine.toml").write_text(text)
    assert read_study(tmp_path / "mine.toml").recipe.architecture == "timm/resnet26"


@pytest.mark.parametrize(
    ("name", "crop", "sizes"),
    [
        ("mobilenetv3_small_050", "", (256, 224)),
        ("tf_efficientnet_b1", "", (272, 240)),
        ("resnet26", "crop = 160", (256, 160)),
        ("tf_efficientnet_b4", "crop = 320", (412, 320)),
    ],
)
def test_a_timm_model_is_fed_as_timm_evaluates_it(tmp_path, name, crop, sizes):
    text = MINIMAL.replace('architecture = "resnet18"', f'architecture = "timm/{name}"\n{crop}')
    (tmp_path / "mine.toml").write_text(text)
    recipe = with_own_sizes(read_study(tmp_path / "mine.toml")).recipe
    assert (recipe.resize, recipe.crop) == sizes


@pytest.mark.parametrize(
    ("space", "word"),
    [
        (
            'freeze = { choices = ["none", "classifier"] }\nfrozen_blocks = { low = 0, high = 5 }',
            "nothing to",
        ),
        ("frozen_blocks = { low = 0, high = 6 }", "resnet18 has 5"),
        ("nesterov = { choices = [true, false] }\nmomentum = { low = 0.0, high = 0.9 }", "nesterov needs"),
    ],
)
def test_a_space_with_impossible_points_is_refused(tmp_path, space, word):
    (tmp_path / "mine.toml").write_text(MINIMAL + space)
    with pytest.raises(SpecError, match=word):
        read_study(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("fixed", "searched", "found"),
    [
        ({}, {}, []),
        ({"step_size": 5}, {"schedule": ("step", "cosine")}, []),
        ({"schedule": "cosine", "step_size": 5}, {"gamma": (0.1, 0.5)}, ["recipe.step_size", "space.gamma"]),
        ({"optimizer": "adamw", "nesterov": True}, {}, ["recipe.nesterov"]),
        ({"nesterov": True}, {"optimizer": ("sgd", "adamw")}, []),
        ({"smallest_area": 0.5}, {"augmentation": ("center_crop", "random_crop")}, ["recipe.smallest_area"]),
        ({"smallest_area": 0.5}, {"augmentation": ("center_crop", "random_resized_crop")}, []),
        ({"weights": "imagenet", "freeze": "features", "frozen_blocks": 2}, {}, ["recipe.frozen_blocks"]),
        ({"freeze": "features"}, {}, ["recipe.freeze"]),
        ({"init": "kaiming"}, {}, []),
        ({"weights": "imagenet"}, {"init": ("default", "kaiming")}, ["space.init"]),
        ({}, {"frozen_blocks": (0, 2)}, ["space.frozen_blocks"]),
        ({"step_size": 5}, {"epochs": (2, 5), "gamma": (0.1, 0.5)}, ["recipe.step_size", "space.gamma"]),
        ({"step_size": 5}, {"epochs": (2, 6), "gamma": (0.1, 0.5)}, []),
        ({"weights": "imagenet", "freeze": "classifier", "head_lr_factor": 9}, {}, ["recipe.head_lr_factor"]),
        ({"weights": "imagenet", "head_lr_factor": 9}, {"freeze": ("classifier", "features")}, []),
    ],
)
def test_what_no_trial_would_use_is_named(fixed, searched, found):
    recipe = Hyperparameters(architecture="alexnet", **fixed)
    space = {name: Choices(choices=choices) for name, choices in searched.items()}
    assert [line.split(" ")[0] for line in without_effect(recipe, space)] == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ('[pruner]\nname = "median"\nwarmup_epochs = 29\nstartup_trials = 2', []),
        ("[pruner]\nwarmup_epochs = 30", ["pruner.warmup_epochs"]),
        ('[pruner]\nname = "none"\nwarmup_epochs = 50', ["pruner.warmup_epochs"]),
        ('[pruner]\nname = "median"\npercentile = 30', ["pruner.percentile"]),
        ('[pruner]\nname = "hyperband"\nstartup_trials = 3', ["pruner.startup_trials"]),
        ('[pruner]\nname = "percentile"\nreduction_factor = 4', ["pruner.reduction_factor"]),
        ('[sampler]\nname = "random"\nstartup_trials = 3', ["sampler.startup_trials"]),
        ("epochs = { low = 5, high = 10 }", ["pruner.warmup_epochs"]),  # the default of 10
    ],
)
def test_settings_of_pruner_and_sampler_that_never_act_are_named(text, found):
    assert [line.split(" ")[0] for line in warnings_of(parse(MINIMAL + text))] == found


def test_sizes_that_do_not_fit_timms_own_are_refused(tmp_path):
    text = MINIMAL.replace('architecture = "resnet18"', 'architecture = "timm/resnet50"\ncrop = 240')
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(SpecError, match="crop 240 is larger than resize 235"):
        with_own_sizes(read_study(tmp_path / "mine.toml"))


def test_the_readmes_example_is_a_study(tmp_path):
    readme = Path(__file__).parents[1] / "README.md"
    (text,) = re.findall(r"```toml\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "mine.toml").write_text(text)
    spec = read_study(tmp_path / "mine.toml")
    assert spec.recipe == Hyperparameters(architecture="resnet18"), "not the defaults that it says it shows"
    named = set(re.findall(r"^#? ?(\w+) = ", text.split("[space]")[0], flags=re.MULTILINE))
    assert set(Hyperparameters.model_fields) - named <= {"learning_rate", "epochs", "step_size", "precision"}
