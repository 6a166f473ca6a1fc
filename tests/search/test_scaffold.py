"""`init` writes a study file that fits the data and that `search` takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_folders
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.sizes import short_sides
from caltech_hpo.errors import UsageError
from caltech_hpo.search.request import Place, check_enqueued
from caltech_hpo.search.run import locate_data
from caltech_hpo.search.scaffold import Facts, check_name, facts_of, parsed, study_text
from caltech_hpo.study_checks import warnings_of
from caltech_hpo.study_files import read_study


@given(
    training=st.integers(2, 10**6), classes=st.integers(2, 1000), fewest=st.integers(1, 1000),
    side=st.integers(1, 5000), name=st.text(min_size=1), listed=st.booleans(), scratch=st.booleans(),
    model=st.sampled_from(["alexnet", "resnet18", "vgg16", "efficientnet_lite0", "timm/resnet10t"]),
)  # fmt: skip
def test_every_file_is_a_study_whose_fields_all_count(
    training, classes, fewest, side, name, listed, scratch, model
):
    facts = Facts(Path("/data") / "x", training, 1, 1, classes, fewest, name, fewest + 9, side, listed)
    text = study_text("mine", facts, model, scratch=scratch)
    spec = parsed("mine", text)
    assert spec.recipe.architecture == model and spec.folder == "/data/x" and spec.data == "folder"
    assert (spec.recipe.init == "kaiming") == (scratch and model == "alexnet")
    assert not warnings_of(spec)
    check_enqueued(spec, {"learning_rate": 0.01})  # [recipe] has the rest
    assert all("\n" not in line and (not line or line[0] != " ") for line in text.splitlines())


@given(folder=st.text(min_size=1).filter(lambda text: text != "." and not {*"\0/"} & {*text}))
def test_any_folder_can_be_named(folder):
    facts = Facts(Path("/data") / folder, 90, 1, 1, 3, 9, "a", 9, 64, False)
    assert parsed("mine", study_text("mine", facts, "resnet18", scratch=True)).folder == f"/data/{folder}"


def test_init_then_the_next_command_finds_the_images(tmp_path, monkeypatch):
    from caltech_hpo.cli.app import app

    write_folders(tmp_path / "pictures", images=12, size=(64, 48))
    monkeypatch.chdir(tmp_path)
    index = scan(tmp_path / "pictures")
    assert facts_of(index, tmp_path / "pictures", short_sides(index)).side == 48
    done = CliRunner().invoke(app, ["init", "mine", "--data", "pictures", "--from-scratch"])
    assert done.exit_code == 0 and "search --study mine --trials 40" in done.stdout
    spec = read_study(Path("studies/mine.toml"))
    assert (spec.recipe.architecture, spec.recipe.crop, spec.recipe.resize) == ("resnet18", 42, 48)
    assert locate_data(spec, Place(tmp_path, "sqlite:///x.db")) == tmp_path / "pictures"
    elsewhere = Place(tmp_path, "sqlite:///x.db", tmp_path / "other")
    assert locate_data(spec, elsewhere) == tmp_path / "other"
    again = CliRunner().invoke(app, ["init", "mine", "--data", "pictures"])
    assert isinstance(again.exception, UsageError) and "there already" in str(again.exception)
    assert CliRunner().invoke(app, ["init", "mine", "--data", "pictures", "--force"]).exit_code == 0


@pytest.mark.parametrize("name", ["../x", "a@2", "", "demo", "a b", "a" * 101])
def test_names_that_no_file_may_have(name):
    with pytest.raises(UsageError):
        check_name(name)
