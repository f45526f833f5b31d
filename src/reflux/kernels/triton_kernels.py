"""Triton kernels over tables of raw logits: one program per row, the vocabulary in blocks, everything in
float32 registers.

Sums are kept lane by lane and joined once at the end of a row: no barrier inside the loop, and shorter chains
of roundings. Row offsets are 64-bit (a table may hold more than 2^31 logits). Called through
`triton_divergence`; importing this module needs Triton.
"""

import triton
import triton.language as tl

# a running maximum that starts here, not at -inf, never makes inf - inf
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _row(x_ptr: tl.tensor, stride: int, columns: tl.tensor, width: int) -> tl.tensor:
    """One block of this program's row; -inf, a probability of 0, beyond its end."""
    row = tl.program_id(0).to(tl.int64)
    return tl.load(x_ptr + row * stride + columns, mask=columns < width, other=float("-inf")).to(tl.float32)


@triton.jit
def _second(x: tl.tensor) -> tl.tensor:
    """(exp(x) - 1 - x) / x^2 where |x| < 1/2: Taylor's series, to 1e-8."""
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))
    return 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series))


@triton.jit
def _expm1(x: tl.tensor) -> tl.tensor:
    """exp(x) - 1 without cancellation."""
    return tl.where(tl.abs(x) < 0.5, x * (1 + x * _second(x)), tl.exp(x) - 1)


@triton.jit
def row_logsumexp(
    x_ptr: tl.tensor,
    stride: int,
    skip_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    width: int,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """log sum exp of each row, without the columns marked in a dense uint8 table where SKIP. One exp per
    logit, maximum on the fly.
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + lanes
        x = _row(x_ptr, stride, columns, width)
        if SKIP:
            skipped = tl.load(skip_ptr + row.to(tl.int64) * width + columns, mask=columns < width, other=1)
            x = tl.where(skipped != 0, float("-inf"), x)
        gap = x - top
        fade = tl.exp(-tl.abs(gap))
        total = tl.where(gap > 0, total * fade + 1, total + fade)
        top = tl.maximum(top, x)
    peak = tl.max(top, 0)
    tl.store(lse_ptr + row, peak + tl.log(tl.sum(total * tl.exp(top - peak), 0)))


@triton.jit
def _kl_term(p: tl.tensor, q: tl.tensor, over: tl.tensor) -> tl.tensor:
    """p log(p / q) - p + q with over = log(p / q): a KL whose terms are all >= 0.

    The same sum for probabilities. A rounding of either logsumexp, which shifts a whole row of log-probs,
    enters the plain sum as it is and this one squared; a small divergence keeps its digits.
    """
    term = tl.where(tl.abs(over) < 0.5, p * over * over * _second(-over), p * over + (q - p))
    return tl.where(p == 0, q, term)


@triton.jit
def _mixed_terms(
    p: tl.tensor, q: tl.tensor, gap: tl.tensor, share: float, KIND: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(cost, slope) of the kinds that compare with m = (1 - share) p + share q; gap = log q - log p.

    log m is measured from the larger of the two, so that no digit of a small gap is lost and equal models
    give 0 to the bit.
    """
    above = tl.where(gap > 0, 1 - share, share)
    # log 1 = 0 to the bit where the gap is 0
    m = tl.log(1 + above * (tl.exp(-tl.abs(gap)) - 1))
    # log p - log m
    p_over = tl.where(gap > 0, -gap - m, -m)
    q_over = tl.where(gap > 0, -m, gap - m)
    mixed = (1 - share) * p + share * q
    if KIND == "jsd":
        cost = share * _kl_term(q, mixed, q_over) + (1 - share) * _kl_term(p, mixed, p_over)
        slope = tl.where(p == 0, 0.0, (1 - share) * p * p_over)
    elif KIND == "skew_reverse":
        cost = _kl_term(p, mixed, p_over)
        slope = tl.where(p == 0, 0.0, p * (p_over - (1 - share) * _expm1(p_over)))
    else:
        cost = _kl_term(q, mixed, q_over)
        slope = tl.where(p == 0, 0.0, -(1 - share) * p * _expm1(q_over))
    return cost, slope


@triton.jit
def _terms(s: tl.tensor, t: tl.tensor, share: float, KIND: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """What one token adds to the row's divergence, and that term's derivative by log p. s = log p student, t
    = log q teacher.

    The derivative is given up to a multiple of p, which the softmax's own derivative removes: chosen so that
    it is 0 where p = q. A probability of 0 adds 0; so do columns beyond the row, where both are 0. KIND
    "records" is (reverse KL, entropy).
    """
    p = tl.exp(s)
    q = tl.exp(t)
    # never inf - inf
    gap = tl.where((p == 0) & (q == 0), 0.0, t - s)
    if KIND == "reverse":
        cost = _kl_term(p, q, -gap)
        slope = tl.where(p == 0, 0.0, -p * gap)
    elif KIND == "records":
        cost = _kl_term(p, q, -gap)
        slope = tl.where(p == 0, 0.0, -p * s)
    elif KIND == "forward":
        cost = _kl_term(q, p, gap)
        slope = p - q
    elif KIND == "tv":
        cost = 0.5 * tl.abs(p - q)
        slope = p * tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))
    elif KIND == "alpha":
        drop = -tl.abs(gap)
        weight = tl.where(gap > 0, share, 1 - share)
        whole = _expm1(drop)
        part = _expm1(weight * drop)
        cost = tl.maximum(p, q) * (weight * whole - part) * (1 / (share * (1 - share)))
        slope = tl.maximum(p, q) * tl.where(gap > 0, whole - part, -part) * (1 / (1 - share))
    else:
        cost, slope = _mixed_terms(p, q, gap, share, KIND)  # pyright: ignore[reportGeneralTypeIssues]
    return cost, slope


@triton.jit
def row_sums(
    s_ptr: tl.tensor,
    s_stride: int,
    s_lse_ptr: tl.tensor,
    t_ptr: tl.tensor,
    t_stride: int,
    t_lse_ptr: tl.tensor,
    cost_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    width: int,
    share: float,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The divergence of each row and the sum of its slopes."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    s_lse = tl.load(s_lse_ptr + row)
    t_lse = tl.load(t_lse_ptr + row)
    costs = tl.full([BLOCK], 0.0, tl.float32)
    slopes = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + lanes
        s = _row(s_ptr, s_stride, columns, width) - s_lse
        t = _row(t_ptr, t_stride, columns, width) - t_lse
        cost, slope = _terms(s, t, share, KIND)
        costs += cost
        slopes += slope
    tl.store(cost_ptr + row, tl.sum(costs, 0))
    tl.store(slope_ptr + row, tl.sum(slopes, 0))


@triton.jit
def row_gradient(
    s_ptr: tl.tensor,
    s_stride: int,
    s_lse_ptr: tl.tensor,
    t_ptr: tl.tensor,
    t_stride: int,
    t_lse_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    coef_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    width: int,
    share: float,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """coef (slope - p sum of slopes) into a dense table; exactly 0 where coef is 0, whatever the row's cost."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    s_lse = tl.load(s_lse_ptr + row)
    t_lse = tl.load(t_lse_ptr + row)
    total = tl.load(slope_ptr + row)
    coef = tl.load(coef_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + lanes
        s = _row(s_ptr, s_stride, columns, width) - s_lse
        t = _row(t_ptr, t_stride, columns, width) - t_lse
        _, slope = _terms(s, t, share, KIND)
        grad = tl.where(coef == 0, 0.0, coef * (slope - tl.exp(s) * total))
        place = grad_ptr + row.to(tl.int64) * width + columns
        tl.store(place, grad.to(grad_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def row_softmax_gradient(
    x_ptr: tl.tensor,
    stride: int,
    lse_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    tail_coef_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    width: int,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """tail_coef exp(x - rest) - total exp(x - lse) into a dense table: the gradient at ids that are not
    listed.
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + row)
    total = tl.load(total_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + lanes
        x = _row(x_ptr, stride, columns, width)
        grad = tl.where(total == 0, 0.0, -total * tl.exp(x - lse))
        if TAIL:
            tail_coef = tl.load(tail_coef_ptr + row)
            grad += tl.where(tail_coef == 0, 0.0, tail_coef * tl.exp(x - tl.load(rest_ptr + row)))
        place = grad_ptr + row.to(tl.int64) * width + columns
        tl.store(place, grad.to(grad_ptr.dtype.element_ty), mask=columns < width)
