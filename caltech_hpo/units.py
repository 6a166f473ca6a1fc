"""Quantities for people. Imports nothing: the command line starts with it."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes as "12 MiB" or "1.5 GiB"."""
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:.1f} GiB"


def bytes_of(gibibytes: float | None) -> int | None:
    """GiB as bytes; None stays."""
    return None if gibibytes is None else int(gibibytes * 2**30)
