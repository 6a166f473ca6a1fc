"""Where our Triton kernels run. Knows nothing of Triton until it is asked."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LEAST_CHANNELS = 16  # that the kernels take; of more, whole multiples


def runs_fused(images: Tensor) -> bool:
    """Whether images are computed in bf16 autocast on a GPU, for which the fused modules are."""
    return images.is_cuda and torch.is_autocast_enabled("cuda") and images.dtype != torch.float64


@functools.cache
def kernels_run(device: torch.device) -> bool:
    """Whether Triton compiles and runs a kernel on the GPU: it comes with torch for Linux alone, and needs
    a C compiler. Tried once a process, for half a second (Triton keeps what it has compiled on the disk)."""
    images = torch.ones((1, LEAST_CHANNELS, 1, 1), device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    try:
        from caltech_hpo.training.gpu_kernels import relu_gradient

        relu_gradient(images, images)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of Triton, of the compiler it calls, of the file system: then torch's own kernels
        return False
    return True
