"""Triton kernels over tables, that is matrices of raw logits [N, V]: one program per row, the vocabulary in
blocks, all values in float32 registers.

Sums are kept per lane and added up once at the end of a row. So there is no barrier inside the loop, and
fewer roundings follow one another. Row offsets are 64-bit, because a table may have more than 2^31 logits.
The kernels are called through `triton_divergence`. Importing this module needs Triton.
"""

import triton
import triton.language as tl

# start of a running maximum; with -inf as the start, inf - inf could occur
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _row(x_ptr: tl.tensor, stride: int, columns: tl.tensor, width: int) -> tl.tensor:
    """One block of this program's row. Beyond the end of the row the values are -inf, a probability of 0."""
    row = tl.program_id(0).to(tl.int64)
    return tl.load(x_ptr + row * stride + columns, mask=columns < width, other=float("-inf")).to(tl.float32)


@triton.jit
def _second(x: tl.tensor) -> tl.tensor:
    """(exp(x) - 1 - x) / x^2 for |x| < 1/2 by its Taylor series, to 1e-8."""
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
    """The logsumexp of each row of logits. If SKIP, a logit is left out where the uint8 mask at skip_ptr, of
    shape [rows, width], is not 0. One loop updates the maximum and the sum, with one exp per logit.
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

    For probabilities the sum is the same. A rounding error of a logsumexp shifts all log-probs of a row. It
    enters the plain sum linearly and this sum squared, so a small divergence keeps its digits.
    """
    term = tl.where(tl.abs(over) < 0.5, p * over * over * _second(-over), p * over + (q - p))
    return tl.where(p == 0, q, term)


@triton.jit
def _mixed_terms(
    p: tl.tensor, q: tl.tensor, gap: tl.tensor, share: float, KIND: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(cost, slope) of the kinds that compare with m = (1 - share) p + share q; gap = log q - log p.

    log m is computed relative to the larger of log p and log q, so that a small gap loses no digits and
    equal models give exactly 0.
    """
    above = tl.where(gap > 0, 1 - share, share)
    # Exactly 0 (log 1) where the gap is 0.
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
    """The term of one token in the row's divergence, and the derivative of the term by log p. s = log p of
    the student, t = log q of the teacher.

    The derivative is given up to a multiple of p, which the derivative of the softmax removes. The multiple
    is chosen so that the derivative is 0 where p = q. A probability of 0 adds 0. Columns beyond the row add
    0 too, because both probabilities are 0 there. KIND "records" is (reverse KL, entropy).
    """
    p = tl.exp(s)
    q = tl.exp(t)
    # This avoids inf - inf.
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
    """Write coef (slope - p sum of slopes) into a dense table; exactly 0 where coef is 0, for any cost of
    the row.
    """
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
    """Write tail_coef exp(x - rest) - total exp(x - lse) into a dense table: the gradient at ids that are
    not listed.
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
