"""How many rows go through a head at once. The library chooses: a user has no way to know, and results do not
depend on it.
"""

from __future__ import annotations

import torch

# all [rows, V] tables of one chunk together
_TABLE_BYTES = {"cpu": 320 << 20, "cuda": 2 << 30}
# one [rows, V] table of one block: what fits a processor's cache, or, elsewhere, bounds temporaries
_BLOCK_FLOATS = {"cpu": 1 << 19}


def chunk_rows(vocabulary: int, device: torch.device, tables: int = 2) -> int:
    """Rows whose float32 tables [rows, V] fit the memory budget: at least 16, so that the matrix products
    stay worth their launch.

    tables: how many are alive at once.
    """
    return max(16, _TABLE_BYTES.get(device.type, 1 << 30) // (4 * tables * vocabulary))


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Rows on which everything but the matrix products is done at once, at least 4."""
    return max(4, _BLOCK_FLOATS.get(device.type, 1 << 26) // vocabulary)
