"""Chooses how many rows an output head (the matrix that maps hidden states to logits) processes at once.

The library chooses this number, because a user cannot know a good one and the results do not depend on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# bytes of all [rows, V] matrices of one chunk together
_TABLE_BYTES = {"cpu": 320 << 20, "cuda": 2 << 30}
# floats of one [rows, V] matrix of one block. On a CPU it fits into the processor's cache; elsewhere it
# limits the temporary memory.
_BLOCK_FLOATS = {"cpu": 1 << 19}


def chunk_rows(vocabulary: int, device: torch.device, tables: int = 2) -> int:
    """The number of rows whose float32 tables (matrices [rows, V]) fit the memory budget of the device. At
    least 16, so that the matrix products take longer than their launch.

    tables: the number of tables in memory at the same time.
    """
    return max(16, table_bytes(device.type) // (4 * tables * vocabulary))


def table_bytes(kind: str) -> int:
    """Bytes of all tables of one chunk together, at most. kind: the type of the device."""
    return _TABLE_BYTES.get(kind, 1 << 30)


def block_rows(vocabulary: int, device: torch.device) -> int:
    """The number of rows that everything except the matrix products processes at once, at least 4."""
    return max(4, _BLOCK_FLOATS.get(device.type, 1 << 26) // vocabulary)
