"""The noise of `models.rng` from its definition, in Python's integers."""

from __future__ import annotations

import math

import numpy as np
import torch

from reflux.models.rng import gumbel

WORD = (1 << 64) - 1


def hashed(key: int, position: int, token: int) -> int:
    """The finaliser of splitmix64 of (key, position, token), all 64 bits of it."""
    z = (key + (position + 1) * 0x9E3779B97F4A7C15 + (token + 1) * 0xD1B54A32D192ED03) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def test_noise_is_the_definition_in_every_block_of_rows() -> None:
    """Enough rows and tokens for several blocks, of which the last is not full."""
    keys, positions, vocabulary = [5, -3, (1 << 63) - 1, 0, -(1 << 63)], [0, 7, 1 << 40, 2, 3], 30_000
    made = gumbel(torch.tensor(keys), torch.tensor(positions), vocabulary)
    assert made.shape == (5, vocabulary)
    for row, key, position in zip(made, keys, positions, strict=True):
        for token in (0, 1, 4_095, vocabulary - 1):
            uniform = ((hashed(key & WORD, position, token) >> 41) + 0.5) * 2.0**-23
            np.testing.assert_allclose(row[token], -math.log(-math.log(uniform)), rtol=1e-5, atol=1e-6)


def test_no_rows_have_no_noise() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert gumbel(none, none, 7).shape == (0, 7)
