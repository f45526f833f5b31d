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
# numbers that a CPU computes at once, so that they stay in its cache
_BLOCK = 1 << 16
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
    ids_V = torch.arange(1, count + 1, dtype=torch.int64, device=keys_B.device) * _signed(_STEP_V)
    starts_B = keys_B + (position_B + 1) * _signed(_STEP_T)
    uniform_BV = torch.empty(len(keys_B), count, dtype=torch.float32, device=keys_B.device)
    rows = max(1, _BLOCK // count) if keys_B.device.type == "cpu" else len(keys_B)
    # All blocks use the same two buffers: new memory for each result takes longer than the arithmetic.
    buffers_2RV = ids_V.new_empty(2, min(rows, len(keys_B)), count)
    for start_R, uniform_RV in zip(starts_B.split(rows), uniform_BV.split(rows), strict=True):
        z_RV, spare_RV = buffers_2RV[:, : len(start_R)]
        torch.add(start_R[:, None], ids_V, out=z_RV)
        z_RV.bitwise_xor_(_shift(z_RV, 30, spare_RV)).mul_(_signed(_MIX_1))
        z_RV.bitwise_xor_(_shift(z_RV, 27, spare_RV)).mul_(_signed(_MIX_2))
        # The hash ends with z ^ (z >> 31), which changes only the lowest 33 bits. They are not used here.
        uniform_RV.copy_(_shift(z_RV, 41, spare_RV))
    return uniform_BV.add_(0.5).mul_(2.0**-23)


def _shift(z: Tensor, bits: int, out: Tensor) -> Tensor:
    """Logical right shift, written to `out`, because the right shift of torch for int64 is arithmetic."""
    return torch.bitwise_right_shift(z, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
