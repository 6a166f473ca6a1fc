"""Where a training runs and in which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from caltech_hpo.data.batches import Images
from caltech_hpo.data.cache import LabeledImages
from caltech_hpo.data.resident import make_resident, resident_bytes
from caltech_hpo.errors import UsageError
from caltech_hpo.terms import Precision

AMPERE = (8, 0)
PACKAGES = ("caltech-hpo", "torch", "torchvision", "timm", "optuna")
RESIDENT_SHARE = 0.25  # of a GPU's free memory: the rest is for training, and for other workers


def resolve_device(name: str) -> torch.device:
    """ "auto" | "cpu" | "cuda" | "cuda:K" | "mps" to a device that is there. Raises UsageError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cpu" and not number:
        return torch.device("cpu")
    if kind == "mps" and not number and torch.backends.mps.is_available():
        return torch.device("mps")
    if kind == "cuda" and (not number or number.isdigit()):
        if int(number or 0) < torch.cuda.device_count():
            return torch.device("cuda", int(number or 0))
        raise UsageError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s)", _choices()
        )
    raise UsageError(f"--device {name}: unknown, or not on this machine", _choices())


def _choices() -> str:
    found = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return f"use one of: {', '.join(found)}"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware: CUDA from Ampere, AVX512-BF16, AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """ "auto" becomes "bf16" where that is fast, else "fp32"; the others stay."""
    if precision != "auto":
        return precision
    return "bf16" if has_fast_bf16(device) else "fp32"


@contextlib.contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """bf16 autocast for "bf16", nothing for "fp32". The precision must be resolved."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield


def try_algorithms(*, wanted: bool) -> None:
    """Whether cuDNN tries its algorithms on the next shapes that it has not seen, and keeps the fastest.

    Worth its seconds for the batches of an epoch, not for the rest that each epoch ends with.
    """
    torch.backends.cudnn.benchmark = wanted


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_near(device: torch.device, *splits: LabeledImages, allowed: int | None = None) -> list[Images]:
    """The splits, copied into a GPU's memory where they take at most a quarter of what is free there.

    Or of the bytes `allowed`, if those are fewer.
    """
    if device.type != "cuda":
        return list(splits)
    free, _ = torch.cuda.mem_get_info(device)
    room = free if allowed is None else min(free, allowed)
    if sum(resident_bytes(split) for split in splits) > RESIDENT_SHARE * room:
        return list(splits)
    return [make_resident(split, device) for split in splits]


def describe_device(device: torch.device) -> str:
    """A name for the records: "cpu" or "cuda:0 (NVIDIA H100)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def versions() -> dict[str, str]:
    """The installed packages that decide what a training computes."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # timm is an extra
            found[package] = version(package)
    return found
