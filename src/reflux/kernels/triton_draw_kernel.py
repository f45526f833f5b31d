"""The Triton kernel of `triton_draw`: one program per row, the vocabulary in blocks. Importing this module
needs Triton.
"""

import triton
import triton.language as tl

from reflux.kernels.triton_kernels import LOWEST

# the constants of the hash of reflux.models.rng
_STEP_T = tl.constexpr(0x9E3779B97F4A7C15)
_STEP_V = tl.constexpr(0xD1B54A32D192ED03)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _gumbel(z: tl.tensor) -> tl.tensor:
    """Standard Gumbel noise of each 64-bit state, float32."""
    z = (z ^ (z >> 30)) * _MIX_1
    z = (z ^ (z >> 27)) * _MIX_2
    z = z ^ (z >> 31)
    uniform = ((z >> 41).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def draw_row(
    x_ptr: tl.tensor,
    stride: int,
    key_ptr: tl.tensor,
    position_ptr: tl.tensor,
    token_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    tempered_ptr: tl.tensor,
    width: int,
    inverse: float,
    BLOCK: tl.constexpr,
) -> None:
    """Each lane keeps the largest of its noisy logits and the sums of both logsumexps; inverse: 1 over the
    temperature.
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    key = tl.load(key_ptr + row).to(tl.uint64)
    state = key + (tl.load(position_ptr + row).to(tl.uint64) + 1) * _STEP_T
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], 0, tl.int32)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.full([BLOCK], 0.0, tl.float32)
    tempered = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + lanes
        where = x_ptr + row.to(tl.int64) * stride + columns
        x = tl.load(where, mask=columns < width, other=float("-inf")).to(tl.float32)
        noisy = x * inverse + _gumbel(state + (columns + 1).to(tl.uint64) * _STEP_V)
        place = tl.where(noisy > best, columns, place)
        best = tl.maximum(best, noisy)
        drop = -tl.abs(x - top)
        fade = tl.exp(drop)
        tempered_fade = tl.exp(drop * inverse)
        total = tl.where(x > top, total * fade + 1, total + fade)
        tempered = tl.where(x > top, tempered * tempered_fade + 1, tempered + tempered_fade)
        top = tl.maximum(top, x)
    # The lowest id among equals, and the last one where every value is not a number.
    token = -tl.max(tl.where(best == tl.max(best, 0), -place, 1 - width), 0)
    peak = tl.max(top, 0)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(lse_ptr + row, peak + tl.log(tl.sum(total * tl.exp(top - peak), 0)))
    scaled = tl.log(tl.sum(tempered * tl.exp((top - peak) * inverse), 0))
    tl.store(tempered_ptr + row, peak * inverse + scaled)
