"""What our Triton kernels compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
import torch

GPU = torch.device("cuda", 0)


def test_interpreted_on_a_cpu_the_kernels_compute_what_torch_does():
    """In a process of its own: Triton reads when it is imported whether it interprets."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(kernel_cases.__file__))], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 192, 13, 11), (64, 64, 56, 56), (32, 512, 7, 7)])
def test_on_a_gpu_the_kernels_compute_what_torch_does(shape):
    assert kernel_cases.check_all(GPU, [shape], [torch.bfloat16]) > 10


@pytest.mark.gpu
def test_the_same_inputs_give_the_same_sums():
    from caltech_hpo.training.batch_norm import BatchNorm

    given = kernel_cases.images((64, 64, 56, 56), torch.bfloat16, GPU).requires_grad_()
    norm = torch.nn.BatchNorm2d(64).to(GPU)

    def gradient():
        output = BatchNorm.apply(
            given, None, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            norm.num_batches_tracked, norm.eps, norm.momentum, True, None,
        )  # fmt: skip
        return torch.autograd.grad(output, given, output.detach())[0]

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(5))
