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
# with fused kernels: bytes of the gradient [rows, V] of one chunk, and of all float32 logits of one block
_GRADIENT_BYTES, _LOGIT_BYTES = 5 << 28, 5 << 27
# rows of a tile of a matrix product on a GPU
_TILE = 128


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


def fused_rows(rows: int, vocabulary: int, tables: int, gradient_bytes: int) -> tuple[int, int]:
    """The rows of a chunk and of a block with fused kernels. A chunk has one gradient, which goes through the
    matrix products. A block has the float32 logits of all models.

    The rows are shared out evenly, in whole tiles of the matrix products. tables: the number of models.
    gradient_bytes: of one number of the gradient.
    """
    chunk = _even(rows, _GRADIENT_BYTES // (gradient_bytes * vocabulary))
    return chunk, _even(chunk, _LOGIT_BYTES // (4 * tables * vocabulary))


def _even(rows: int, most: int) -> int:
    """The smallest multiple of a tile that divides the rows into as few parts as parts of `most` rows do."""
    whole = max(_TILE, most // _TILE * _TILE)
    parts = max(1, -(-rows // whole))
    return -(-max(1, rows) // (parts * _TILE)) * _TILE
