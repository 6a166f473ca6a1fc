"""Our Triton kernels against torch in float32: on a GPU, or interpreted on a CPU.

As a program it runs all cases on the CPU; TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

SHAPES = [(2, 16, 7, 9), (3, 192, 13, 11), (2, 64, 16, 16)]
POOLS = [(2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 1)]
# summand, ReLU, pooling after a batch norm
NORMS = [
    (False, False, None),
    (False, True, None),
    (True, False, None),
    (True, True, None),
    (False, True, (2, 2, 0)),
    (False, True, (3, 2, 1)),
]
TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}  # the interpreter cuts bf16 where a GPU rounds


def images(shape, dtype, device, seed=0):
    """Random images in channels_last."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(device, dtype).contiguous(memory_format=torch.channels_last)


def agree(found, expected, dtype):
    """Whether the norm of the difference is small beside the norm."""
    found, expected = found.float(), expected.float()
    assert found.shape == expected.shape
    return bool((found - expected).norm() <= TOLERANCE[dtype] * expected.norm())


def check_relu(shape, dtype, device):
    """A rectified gradient, and its sums."""
    from caltech_hpo.training.gpu_kernels import relu_gradient

    gradient, output = images(shape, dtype, device), images(shape, dtype, device, 1).relu()
    gradient = gradient.flip(0).contiguous()  # any memory format is taken
    found, sums = relu_gradient(gradient, output.contiguous())
    assert torch.equal(found, gradient * (output > 0))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert agree(sums, found.float().sum((0, 2, 3)), torch.float32)


def check_pooling(shape, dtype, device, pools):
    """ReLU and max pooling, forward and backward."""
    from caltech_hpo.training.gpu_kernels import back_to_places, largest

    given = images(shape, dtype, device)
    plain = given.float().requires_grad_()
    expected = functional.max_pool2d(plain.relu(), *pools)
    output, places = largest(given, pools)
    assert torch.equal(output.float(), expected)
    gradient = images(expected.shape, dtype, device, 1)
    expected.backward(gradient.float())
    found, sums = back_to_places(gradient, places, *shape[2:], pools)
    assert agree(found, plain.grad, dtype) and agree(sums, plain.grad.sum((0, 2, 3)), torch.float32)
    spoiled = given.clone(memory_format=torch.preserve_format)
    spoiled[0, 1, 2, 3] = torch.nan
    output, _ = largest(spoiled, pools)
    assert torch.equal(output[:, 1].isnan(), functional.max_pool2d(spoiled.float(), *pools)[:, 1].isnan())


def check_norm(shape, dtype, device, adds, rectifies, pools):
    """Batch norm in training: outputs, gradients, running statistics."""
    from caltech_hpo.training.batch_norm import BatchNorm

    norm = nn.BatchNorm2d(shape[1]).to(device)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        norm.weight.copy_(torch.rand(shape[1], generator=generator) * 3 - 1)
        norm.bias.copy_(torch.randn(shape[1], generator=generator))
    plain = copy.deepcopy(norm)
    given = (images(shape, torch.float32, device) * 3 + 50).to(
        dtype
    )  # far from 0: squares alone would not do
    given.requires_grad_()
    summand = images(shape, dtype, device, 2).requires_grad_() if adds else None
    output = BatchNorm.apply(
        given, summand, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked,
        norm.eps, norm.momentum, rectifies, pools,
    )  # fmt: skip
    same = [None if one is None else one.detach().float().requires_grad_() for one in (given, summand)]
    expected = plain(same[0])
    expected = expected if same[1] is None else expected + same[1]
    largest = functional.max_pool2d(expected, *pools) if pools else expected
    expected = largest.relu() if rectifies else largest
    assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
    assert agree(output, expected, dtype)
    # nothing comes back where rounding decides what ReLU passes on
    gradient = images(expected.shape, dtype, device, 1) * (largest.abs() > 1e-4)
    output.backward(gradient)
    expected.backward(gradient.float())
    assert agree(given.grad, same[0].grad, dtype)
    assert summand is None or agree(summand.grad, same[1].grad, dtype)
    for name in ("weight", "bias"):
        assert agree(getattr(norm, name).grad, getattr(plain, name).grad, dtype)
    for name in ("running_mean", "running_var"):
        assert agree(getattr(norm, name), getattr(plain, name), torch.float32)
    assert norm.num_batches_tracked == 1


def check_spoiled_norm(device):
    """NaN stays NaN: a diverged training must show."""
    from caltech_hpo.training.batch_norm import BatchNorm
    from caltech_hpo.training.gpu_kernels import relu_gradient

    given = images((2, 16, 4, 4), torch.bfloat16, device)
    given[0, 0, 0, 0] = torch.nan
    assert relu_gradient(torch.ones_like(given), given)[0][0, 0, 0, 0] == 1
    norm = nn.BatchNorm2d(16).to(device)
    given.requires_grad_()
    for pools in (None, (2, 2, 0)):
        output = BatchNorm.apply(
            given, None, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            norm.num_batches_tracked, norm.eps, norm.momentum, True, pools,
        )  # fmt: skip
        assert output[:, 0].isnan().all() and not output[:, 1:].isnan().any()
        (gradient,) = torch.autograd.grad(output.sum(), given)
        assert gradient[:, 0].isnan().all() and not gradient[:, 1:].isnan().any()
    assert norm.running_var[0].isnan() and not norm.running_var[1:].isnan().any()


def check_crops(device, dtype):
    """Crops of decoded images, mirrored and normalised."""
    from caltech_hpo.data.batches import IMAGENET, normalized
    from caltech_hpo.data.resident import ResidentImages

    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[40, 33], [33, 70], [35, 35]])
    counts = sizes.prod(1)
    pixels = torch.randint(0, 256, (int(counts.sum()), 3), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([5, 6, 7])
    data = ResidentImages(pixels.to(device), counts.cumsum(0) - counts, sizes, labels.to(device))
    chosen, corners = torch.tensor([2, 0, 1, 0]), torch.tensor([[1, 2], [7, 0], [0, 37], [3, 0]])
    mean, std = (255 * torch.tensor(levels, device=device) for levels in (IMAGENET.mean, IMAGENET.std))
    for mirrored in (None, torch.tensor([True, False, True, True])):
        found, named = data.batch(chosen, corners, 33, mirrored, mean, std, dtype)
        expected = normalized(data.crops(chosen, corners, 33, mirrored).permute(0, 3, 1, 2), IMAGENET)
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        assert named.tolist() == [7, 5, 6, 5]
        assert torch.equal(found, expected) if dtype == torch.float32 else agree(found, expected, dtype)


def check_blocks(device, dtype):
    """Blocks of pixels as channels."""
    from caltech_hpo.training.convolutions import _blocks
    from caltech_hpo.training.gpu_kernels import pixels_of_blocks

    for side, kernel, stride, padding, depth in ((37, 11, 4, 2, 48), (32, 7, 2, 3, 16), (9, 3, 2, 0, 16)):
        given = images((2, 3, side, side + 3), torch.float32, device)
        sides = [(one + 2 * padding - kernel) // stride + -(-kernel // stride) for one in given.shape[2:]]
        expected = _blocks(given, *sides, stride, padding, dtype)
        found = pixels_of_blocks(given, tuple(sides), depth, stride, padding, dtype)
        real = expected.shape[3]
        assert agree(found[..., :real], expected, dtype) and not found[..., real:].any()
        assert dtype != torch.float32 or torch.equal(found[..., :real], expected)


def check_sgd(device, momentum, nesterov, decay):
    """Steps of a layer, beside torch's; the weights in bf16 are those of now, or none."""
    from caltech_hpo.training.cuda_sgd import VELOCITY, CudaSGD, layers_to_step
    from caltech_hpo.training.linear import CudaLinear

    torch.manual_seed(0)
    plain = nn.Linear(70, 50).to(device)
    layer = copy.deepcopy(plain)
    layer.__class__ = CudaLinear
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": decay, "fused": True}
    steps = [CudaSGD(layer.parameters(), [layer], **options), torch.optim.SGD(plain.parameters(), **options)]
    for number in range(3):
        for optimizer in steps:
            torch.manual_seed(number)
            optimizer.param_groups[0]["lr"] = 0.3 / (number + 1)
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.randn_like(parameter)
            given = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(optimizer.param_groups[0]["params"], given, strict=True))
        for mine, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        assert layer._small(torch.bfloat16) is layer.small
        assert agree(layer.small, layer.weight.detach(), torch.bfloat16)
    steps[0].param_groups[0]["lr"] = torch.tensor(0.1, device=device)
    steps[1].load_state_dict(copy.deepcopy(steps[0].state_dict()))  # one takes the other's
    found = [optimizer.state[optimizer.param_groups[0]["params"][0]] for optimizer in steps]
    assert momentum == 0 or torch.equal(*(state[VELOCITY] for state in found))
    for optimizer in steps:
        optimizer.step()
    assert torch.allclose(layer.weight, plain.weight, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer._small(torch.bfloat16), layer.weight.bfloat16())
    steps[0].step()
    assert layer._small(torch.bfloat16) is layer.small
    assert layer._small(torch.float16) is not layer.small
    layers_to_step(layer)
    assert layer.small is None


@contextlib.contextmanager
def fused_without_a_gpu():
    """The fused modules go their ways for a GPU, in float32; what only CUDA has is made of plain parts."""
    room = "caltech_hpo.training"

    def convolution_relu(images, weight, bias, stride, padding, dilation, groups):
        return functional.conv2d(images, weight, bias, stride, padding, dilation, groups).relu()

    real_mm = torch.mm
    with contextlib.ExitStack() as stack:
        for name in ("convolutions", "fused_norms", "linear"):
            stack.enter_context(mock.patch(f"{room}.{name}.runs_fused", lambda _: True))
        for name in ("convolutions", "fused_norms"):
            stack.enter_context(mock.patch(f"{room}.{name}.kernels_run", lambda _: True))
        stack.enter_context(mock.patch(f"{room}.linear.LARGE", 0))
        stack.enter_context(mock.patch("torch.get_autocast_dtype", lambda _: torch.float32))
        stack.enter_context(mock.patch("torch.cudnn_convolution_relu", convolution_relu))
        stack.enter_context(mock.patch("torch.mm", lambda one, other, out_dtype: real_mm(one, other)))
        yield


def check_models():
    """Whole models: outputs, all gradients and statistics, and outputs when they are only scored."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    from caltech_hpo.training.convolutions import choose_convolutions

    def with_bias():
        return nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2, 2),
            nn.Conv2d(32, 24, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(24 * 9, 32), nn.ReLU(), nn.Linear(32, 5),
        )  # fmt: skip

    def residual(block):
        return ResNet(block, [1, 1, 1, 1], num_classes=5)

    makers = (with_bias, lambda: residual(BasicBlock), lambda: residual(Bottleneck))
    given = images((4, 3, 37, 37), torch.float32, "cpu")
    for make in makers:
        torch.manual_seed(0)
        plain = make().to(memory_format=torch.channels_last)
        fused = copy.deepcopy(plain)
        with fused_without_a_gpu():
            choose_convolutions(fused, "alexnet", torch.device("cuda"), "bf16")
            output = fused(given)
            output.square().sum().backward()
            fused.eval()
            with torch.no_grad():
                scored = fused(given)
        expected = plain(given)
        expected.square().sum().backward()
        assert torch.allclose(output, expected, atol=1e-4, rtol=1e-4)
        for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
            off = float((mine.grad - theirs.grad).norm() / theirs.grad.norm())
            assert off < 1e-3, (make, name, off)
        for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(scored, plain.eval()(given), atol=1e-4, rtol=1e-3)
    return len(makers)


def check_all(device, shapes=SHAPES, types=TYPES):
    """Every case; returns how many."""
    count = 0
    for dtype in types:
        check_crops(device, dtype)
        check_blocks(device, dtype)
    for shape in shapes:
        for dtype in types:
            check_relu(shape, dtype, device)
            for pools in POOLS:
                check_pooling(shape, dtype, device, pools)
            for case in NORMS:
                check_norm(shape, dtype, device, *case)
            count += 1 + len(POOLS) + len(NORMS)
    check_spoiled_norm(device)
    for momentum, nesterov in ((0.0, False), (0.9, False), (0.9, True)):
        for decay in (0.0, 0.01):
            check_sgd(device, momentum, nesterov, decay)
            count += 1
    return count + 1


if __name__ == "__main__":
    print(check_all(torch.device("cpu"), SHAPES[:2]) + check_models())
