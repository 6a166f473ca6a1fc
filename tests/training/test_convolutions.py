"""Convolutions that compute the same in another way."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from caltech_hpo.training.convolutions import (
    CudaConv2d,
    choose_convolutions,
    fuse_again,
    space_to_depth,
)
from caltech_hpo.training.device import try_algorithms
from caltech_hpo.training.fused_norms import CudaBatchNorm2d, Passed, PassedPool
from caltech_hpo.training.models import build_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_depthwise_convolutions_learn_in_fp32_on_a_cpu():
    """Where a gradient is needed, and nowhere else; names and state stay."""
    model = build_model("efficientnet_lite0", "none", 3, seed=0)
    names = list(model.state_dict())
    choose_convolutions(model, "efficientnet_lite0", CPU, "bf16")
    choose_convolutions(model, "efficientnet_lite0", CPU, "bf16")
    assert list(model.state_dict()) == names
    depthwise = model.blocks[1][0].conv_dw  # timm's own class of convolution, with "same" padding
    images = torch.randn(2, 96, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert depthwise(images).dtype == torch.float32
        assert model.conv_head(torch.randn(2, 320, 4, 4)).dtype == torch.bfloat16
        depthwise.requires_grad_(False)
        assert depthwise(images).dtype == torch.bfloat16
        depthwise.requires_grad_(True)
        with torch.inference_mode():
            assert depthwise(images).dtype == torch.bfloat16
    plain = build_model("efficientnet_lite0", "none", 3, seed=0)
    choose_convolutions(plain, "efficientnet_lite0", CPU, "fp32")
    assert type(plain.blocks[1][0].conv_dw).__name__ == "Conv2dSame"


@given(
    height=st.integers(12, 40), width=st.integers(12, 40), kernel=st.integers(2, 11),
    stride=st.integers(2, 5), padding=st.integers(0, 3), channels=st.integers(1, 4),
)  # fmt: skip
def test_blocks_as_channels_are_the_strided_convolution(height, width, kernel, stride, padding, channels):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, channels, kernel, kernel, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    blocks, taps = space_to_depth(images, weight, stride, padding)
    assert blocks.shape[1] % 8 == 0 and blocks.is_contiguous(memory_format=torch.channels_last)
    expected = functional.conv2d(images, weight, stride=stride, padding=padding)
    found = functional.conv2d(blocks, taps)
    assert torch.allclose(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), weight)
    (true,) = torch.autograd.grad(expected.square().sum(), weight)
    assert torch.allclose(gradient, true)


@pytest.mark.parametrize(
    ("architecture", "convolutions", "norms", "relus", "pools", "blocks"),
    [
        ("alexnet", 5, 0, 5, 3, 1),
        ("vgg16", 13, 0, 13, 5, 0),
        ("vgg11_bn", 0, 8, 8, 5, 0),
        ("resnet18", 0, 20, 1, 1, 1),
        ("resnet50", 0, 53, 1, 1, 1),
    ],
)
def test_what_is_changed_for_a_gpu_computes_the_same_without_one(
    architecture, convolutions, norms, relus, pools, blocks
):
    """Names, state and outputs stay: without bf16 autocast on CUDA it is torch's own layers."""
    model, plain = (build_model(architecture, "none", 3, seed=0).eval() for _ in range(2))
    choose_convolutions(model, architecture, GPU, "fp32")
    choose_convolutions(model, "timm/anything", GPU, "bf16")
    assert not any(isinstance(module, (CudaConv2d, CudaBatchNorm2d)) for module in model.modules())
    choose_convolutions(model, architecture, GPU, "bf16")
    choose_convolutions(model, architecture, GPU, "bf16")
    changed = [module for module in model.modules() if isinstance(module, CudaConv2d)]
    assert sum(module.rectifies for module in changed) == convolutions
    assert sum(module.takes_blocks for module in changed) == blocks
    for kind, count in ((Passed, relus), (PassedPool, pools), (CudaBatchNorm2d, norms)):
        assert sum(isinstance(module, kind) for module in model.modules()) == count
    assert list(model.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(images), plain(images))
    for one in (model.train(), plain.train()):
        torch.manual_seed(0)  # dropouts
        one(images).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), plain.buffers(), strict=True))


def test_what_stands_in_two_places_stays_as_it_is():
    """A ReLU that is passed in one place would be missing in the other."""
    torch.manual_seed(0)
    relu, pooling = nn.ReLU(), nn.MaxPool2d(2)
    plain = nn.Sequential(
        nn.Conv2d(3, 16, 3), relu, nn.BatchNorm2d(16), relu, pooling,
        nn.Conv2d(16, 16, 3), nn.ReLU(), pooling,
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)),
    )  # fmt: skip
    model = copy.deepcopy(plain)
    choose_convolutions(model, "alexnet", GPU, "bf16")
    assert sum(isinstance(module, Passed) for module in model.modules()) == 1
    assert not any(isinstance(module, PassedPool) for module in model.modules())
    images = torch.randn(2, 3, 20, 20)
    assert torch.equal(model(images), plain(images))


def test_others_stay_as_they_are():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(),
        nn.Conv2d(8, 8, 3, dilation=2), nn.ReLU(), nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(3, 8, (3, 5), 2),
    )  # fmt: skip
    choose_convolutions(model, "alexnet", GPU, "bf16")
    assert not any(isinstance(module, CudaConv2d) for module in model)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["alexnet", "vgg16", "resnet18"])
def test_on_a_gpu_outputs_and_gradients_agree_with_float32(architecture):
    """As well as torch's own bf16 does, within a factor."""
    images = torch.randn(8, 3, 64, 64, device=GPU).contiguous(memory_format=torch.channels_last)

    def outcome(precision, *, chosen):
        model = build_model(architecture, "none", 3, seed=0, dropout=0.0, init="kaiming").to(GPU)
        model = model.to(memory_format=torch.channels_last)
        if chosen:
            choose_convolutions(model, architecture, GPU, "bf16")
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            output = model(images)
        output.float().square().mean().backward()
        every = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        # of fewer channels than tensor cores take, cuDNN may refuse to fuse: then it goes on without
        ours = [m for m in model.modules() if isinstance(m, CudaConv2d) and m.in_channels >= 8]
        assert not chosen or all(m.fusing for m in ours)
        return output.detach().float(), every

    def apart(one, other):
        return [float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True)]

    exact = outcome("fp32", chosen=False)
    ours, theirs = (apart(outcome("bf16", chosen=chosen), exact) for chosen in (True, False))
    assert all(mine < 2 * other + 1e-3 for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.gpu
def test_where_cudnn_refuses_to_fuse_it_goes_on_without(monkeypatch):
    def refuse(*_):
        raise RuntimeError("unable to find an engine to execute this computation")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).to(GPU)
    choose_convolutions(model, "alexnet", GPU, "bf16")
    with torch.autocast("cuda", torch.bfloat16):
        output = model(torch.randn(2, 3, 8, 8, device=GPU))
    assert (output >= 0).all() and not model[0].fusing
    fuse_again(model)
    assert model[0].fusing


@pytest.mark.gpu
@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "size"),
    [
        (16, 32, 3, 32),
        (48, 64, 3, 57),
        (64, 192, 5, 27),
        (256, 256, 3, 13),
        (64, 64, 3, 224),
        (512, 512, 3, 14),
    ],
)
def test_what_was_in_the_outputs_memory_does_not_matter(channels, outputs, kernel, size, tried):
    """torch hands cuDNN the output as a summand of factor 0: NaN times 0 would be NaN."""
    images = torch.randn(64, channels, size, size, device=GPU, dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(channels, outputs, kernel, padding=kernel // 2), nn.ReLU()).to(GPU)
    plain = model.to(memory_format=torch.channels_last)(images.float())
    choose_convolutions(model, "alexnet", GPU, "bf16")
    try_algorithms(wanted=tried)
    reused = 0
    for _ in range(20):
        # the allocator gives the memory of one of these to the output
        dirty = [torch.full_like(plain, torch.nan, dtype=torch.bfloat16) for _ in range(8)]
        places = {one.data_ptr() for one in dirty}
        del dirty
        with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
            output = model(images)
        reused += output.data_ptr() in places
        assert torch.allclose(output.float(), plain, atol=0.05, rtol=0.02)
    assert model[0].fusing and reused
