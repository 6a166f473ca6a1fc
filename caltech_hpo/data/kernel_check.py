"""Where our Triton kernels run. Knows nothing of Triton until it is asked."""

from __future__ import annotations

import functools

import torch


@functools.cache
def kernels_run(device: torch.device) -> bool:
    """Whether Triton compiles and runs a kernel on the device, a GPU.

    It comes with torch for Linux alone, and needs a C compiler. Tried once a process, which takes half a
    second (Triton keeps what it has compiled on the disk).
    """
    if device.type != "cuda":
        return False
    try:
        from caltech_hpo.data.crop_kernel import try_kernel

        try_kernel(device)
    except Exception as error:  # of Triton, of the compiler that it calls, of the file system
        if "out of memory" in str(error):
            raise
        return False
    return True
