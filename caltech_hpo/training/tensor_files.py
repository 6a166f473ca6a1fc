"""Tensors as the bytes of a safetensors file, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# https://github.com/huggingface/safetensors#format
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT = 8


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements, row-major, as bytes; copied only from another device or layout."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def safetensors_pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The header, then each tensor's bytes: what the file consists of, in its order.

    The library's own writers take all tensors contiguous and on the CPU, copies of those that are not, and
    either make the whole file in memory or write it under a name of their own, which a kill leaves behind.
    """
    # Larger elements first: each tensor begins at a multiple of its elements' size.
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        value, begin = tensors[name], end
        end += value.nbytes
        header[name] = {
            "dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield raw_bytes(tensors[name])
