"""Counter-based noise. The random numbers of a row depend on its key, the position and the token id, and
not on other rows or on the order.

A 64-bit integer hash (the finaliser of splitmix64; Steele, Lea & Flood 2014) of (key, position, token id)
gives one uniform number per entry. Integer arithmetic wraps in the same way on every device, so the uniform
numbers are bit-identical on CPU and GPU, in any batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reflux.config.step_context import seed_of

_STEP_T, _STEP_V = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def row_key(
    seed: int, purpose: str, step: int, prompt_key: str, sample: int, turn: int = 0, rng: int = 0
) -> int:
    """The key of one attempt's random numbers (law 8); the arguments name the attempt and its turn.
    prompt_key: `Prompt.key`. `rng` is that of `SamplingParams`; 0 leaves the key unchanged.
    """
    return seed_of(seed, purpose, step, prompt_key, sample, turn, *([rng] if rng else []))


def gumbel(keys_B: Tensor, position_B: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [B, V], float32, for the token at `position_B` (int64, from 0) of the rows with
    `keys_B` (int64).

    argmax(log p + gumbel) is a sample from p. A uniform number has 23 bits, so the noise never exceeds 16.6
    nats.
    """
    return _uniform(keys_B, position_B, vocabulary).log_().neg_().log_().neg_()


def normal(keys_B: Tensor, position: int, size: int) -> Tensor:
    """Standard normal noise [B, D = size], float32, for denoising step `position` (from 0) of the rows with
    `keys_B` (int64).

    Position -1 is the noise that an image starts from. An entry depends only on (key, position, its index),
    not on `size`. Box-Muller: entries 2k and 2k + 1 come from one pair of uniform numbers, a radius and an
    angle. A uniform number has 23 bits, so the noise never exceeds 5.8 in absolute value.
    """
    pairs = (size + 1) // 2
    radius_BC, angle_BC = (
        _uniform(keys_B, torch.full_like(keys_B, position), 2 * pairs).unflatten(1, (pairs, 2)).unbind(-1)
    )
    radius_BC, angle_BC = (-2 * radius_BC.log()).sqrt(), 2 * math.pi * angle_BC
    return torch.stack([radius_BC * angle_BC.cos(), radius_BC * angle_BC.sin()], dim=-1).flatten(1)[:, :size]


def _uniform(keys_B: Tensor, position_B: Tensor, count: int) -> Tensor:
    """[B, count] in (0, 1), float32, one per entry."""
    ids_V = torch.arange(1, count + 1, dtype=torch.int64, device=keys_B.device)
    z = (keys_B + (position_B + 1) * _signed(_STEP_T))[:, None] + ids_V * _signed(_STEP_V)
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    z = z ^ _shift(z, 31)
    return (_shift(z, 41).to(torch.float32) + 0.5) * 2.0**-23


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift, because the right shift of torch for int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
