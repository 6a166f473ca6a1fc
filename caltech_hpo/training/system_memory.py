"""The memory that the system or a GPU has, and what this process takes of it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import psutil
import torch

# Of the memory that is free when a worker starts; the rest is for what nobody counts.
USABLE_SHARE = 0.8
CGROUP = Path("/sys/fs/cgroup")
# cuDNN 9 has other names than 8, and where none of its algorithms finds memory torch says that it has none.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED", "_ALLOCATION_FAILED",
    "unable to find an engine", "Triton Error [CUDA]: out of memory",
)  # fmt: skip
# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on the device; on a CPU a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: int = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        limit = int((CGROUP / "memory.max").read_text())
        free = min(free, limit - int((CGROUP / "memory.current").read_text()))
    return free


def memory_share(device: torch.device, given: int | None, workers: int) -> int:
    """Bytes that one of `workers` may use beside the images that it has put there by now.

    What of its `given` bytes they leave, or a part of most of what is free.

    CUDA is told, and then refuses more by itself: cuDNN, which tries its algorithms with as much memory as
    it gets, must not take what is other workers'.
    """
    share = int(USABLE_SHARE * free_memory(device)) // workers if given is None else given
    if device.type == "cuda" and (given is not None or workers > 1):
        images, whole = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[1]
        if given is not None:
            share = max(0, share - images)  # they are part of what was given, and not of what is free
        torch.cuda.set_per_process_memory_fraction(min(1.0, (share + images) / whole), device)
    return share


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has taken: resident ones; a GPU's since `MicroBatches` last looked."""
    if device.type == "cuda":  # what others cannot have: a graph's memory is its own between its replays too
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory(device: torch.device) -> None:
    """Lets this process keep what a training step frees on a CPU, for the next step to take.

    By default glibc gives each large tensor back to the kernel, which clears its pages when the next step
    asks for them: 28% of the time of a step of VGG16 (32 images, bf16, 2 cores), 27% of AlexNet's (256
    images). Peaks grew by up to 45% in nine trainings. Without effect where the C library is another.
    """
    if device.type == "cpu":
        with contextlib.suppress(AttributeError, TypeError):  # no such function; no library (Windows)
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_MAX, 0)
            library.mallopt(M_TRIM_THRESHOLD, -1)


def release_freed_memory(device: torch.device) -> None:
    """Gives back to the system what no tensor uses."""
    if device.type == "cuda":
        # Those of a recorded graph's stream outlive it (torch 2.11): one of each training would stay.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a training ran out of memory: neither torch's CPU allocator nor cuDNN has its own exception."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
