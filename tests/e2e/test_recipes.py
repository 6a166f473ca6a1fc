"""A study of one's own that searches nearly every field of the recipe, with the installed command."""

from __future__ import annotations

import tomllib

import pytest
from commands import answer, here
from helpers import write_folders

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.errors import UsageError
from caltech_hpo.search.inline import InlineExecutor
from caltech_hpo.search.messages import WorkerConfig
from caltech_hpo.search.space import most_demanding
from caltech_hpo.study_files import parse_study

STUDY = """# everything at once
data = "folder"

[recipe]
architecture = "{architecture}"
freeze = "{freeze}"
resize = 72
crop = 64
batch_size = 8
epochs = 2
test_time_flip = true

[space]
learning_rate = {{ low = 0.001, high = 0.02, log = true }}
optimizer = {{ choices = ["sgd", "adamw"] }}
nesterov = {{ choices = [true, false] }}
schedule = {{ choices = ["step", "cosine", "one_cycle"] }}
warmup = {{ low = 0.0, high = 0.5 }}
head_lr_factor = {{ low = 0.5, high = 5.0, log = true }}
label_smoothing = {{ low = 0.0, high = 0.2 }}
dropout = {{ low = 0.0, high = 0.5 }}
ema = {{ choices = [0.0, 0.9] }}
{more}
[pruner]
name = "none"
"""
PIXELS = """augmentation = { choices = ["concat", "random_resized_crop_flip"] }
frozen_blocks = { low = 0, high = 4 }
mixup = { choices = [0.0, 0.2] }
cutmix = { choices = [0.0, 1.0] }
erasing = { low = 0.0, high = 1.0 }
color_jitter = { low = 0.0, high = 0.5 }
smallest_area = { low = 0.1, high = 0.5 }
"""
VIEWS = """augmentation = { choices = ["center_crop", "center_crop_flip"] }
"""


def test_more_frozen_blocks_than_there_are_is_refused_before_the_first_trial(tmp_path):
    data = load_search_data(scan(write_folders(tmp_path / "images", images=6)), 72, tmp_path / "cache")
    text = STUDY.format(
        architecture="timm/mobilenetv3_small_050", freeze="none", more="frozen_blocks = { low = 0, high = 9 }"
    )
    spec = parse_study(tomllib.loads(text), name="mine")
    with pytest.raises(UsageError, match="has 7 blocks"):
        InlineExecutor(WorkerConfig(data, "cpu", 1, most_demanding(spec)))


@pytest.mark.parametrize(
    ("architecture", "freeze", "more", "kept"),
    [
        ("efficientnet_lite0", "none", PIXELS, 0),
        ("timm/mobilenetv3_small_050", "features", VIEWS, 4),
    ],
)
def test_a_search_over_the_whole_recipe(tmp_path, architecture, freeze, more, kept):
    write_folders(tmp_path / "images", images=12)
    (tmp_path / "studies").mkdir()
    text = STUDY.format(architecture=architecture, freeze=freeze, more=more)
    (tmp_path / "studies" / "mine.toml").write_text(text)
    data = ("--data", "images")
    trials = 3 if kept else 2
    searched = answer("search", "--study", "mine", "--trials", trials, *data, cwd=tmp_path, run=here)
    assert searched["complete"] + searched["pruned"] == trials
    features = list((tmp_path / "storage" / "cache").glob("features/*.npy"))
    # training and validation, each plain and (training: if a trial asked for it) mirrored
    assert len(features) in ({3, 4} if kept else {0})
    if not kept:
        return
    final = answer("final", "--study", "mine", *data, cwd=tmp_path, run=here)
    assert 0 <= final["test_accuracy_flip"] <= 1 and final["test_images"] == 12
    report = answer("report", "--study", "mine", cwd=tmp_path, run=here)
    rows = {row["trial"]: row for row in report["rows"]}
    assert rows[final["trial"]]["test_accuracy_flip"] == final["test_accuracy_flip"]
    assert all(row["val_accuracy_flip"] is not None for row in rows.values())
    assert report["test_uses"] == 1
