"""Cuts a number of rows into slices."""

from __future__ import annotations

from collections.abc import Iterator


def slices(length: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows, the last one shorter where they do not fit."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
