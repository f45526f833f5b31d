"""Triton kernels over tables, that is matrices of raw logits [N, V]: one program per row, the vocabulary in
blocks, all values in float32 registers.

Sums are kept per lane and added up once at the end of a row. So there is no barrier inside a loop, and
fewer roundings follow one another. Row offsets are 64-bit, because a table may have more than 2^31 logits.
A logit is scaled and capped as it is loaded. The kernels are called through `triton_rows`. Importing this
module needs Triton.
"""

import triton
import triton.language as tl

from reflux.kernels.triton_terms import expm1, kl_term, log_gap, terms

# start of a running maximum; with -inf as the start, inf - inf could occur
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _finish(x: tl.tensor, scale: float, cap: float, CAPPED: tl.constexpr) -> tl.tensor:
    """cap tanh(scale x / cap), or scale x without a cap. With a cap, x = LOWEST means a token left out."""
    y = x * scale
    if CAPPED:
        y = cap - 2 * cap / (tl.exp(y * (2 / cap)) + 1)
        y = tl.where(x == LOWEST, float("-inf"), y)
    return y


@triton.jit
def _row(table: tl.tuple, columns: tl.tensor, width: int, CAPPED: tl.constexpr) -> tl.tensor:
    """One block of this program's row. Beyond the end of the row the values are -inf, a probability of 0.

    table: (pointer, distance of the rows, memory of a row that may be read, scale, cap). The memory is a
    multiple of 16 numbers if possible. Then the compiler knows that a thread's numbers are all inside or all
    outside, and loads them together.
    """
    x_ptr, stride, filled, scale, cap = table
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * stride + columns, mask=columns < filled, other=0.0).to(tl.float32)
    return tl.where(columns < width, _finish(x, scale, cap, CAPPED), float("-inf"))


@triton.jit
def _logp_at(table: tl.tuple, place: tl.tensor, lse: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """The log-prob of one token of this program's row."""
    x_ptr, stride, _, scale, cap = table
    x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * stride + place).to(tl.float32)
    return _finish(x, scale, cap, CAPPED) - lse


@triton.jit
def _more(top: tl.tensor, total: tl.tensor, x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The maximum and sum exp(x - maximum) of each lane with one more logit, with one exp."""
    gap = x - top
    fade = tl.exp(-tl.abs(gap))
    return tl.maximum(top, x), tl.where(gap > 0, total * fade + 1, total + fade)


@triton.jit
def _lse(top: tl.tensor, total: tl.tensor) -> tl.tensor:
    peak = tl.max(top, 0)
    return peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))


@triton.jit
def _logsumexps(
    student: tl.tuple,
    teacher: tl.tuple,
    width: int,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    lanes = tl.arange(0, BLOCK)
    s_top = tl.full([BLOCK], LOWEST, tl.float32)
    s_total = tl.full([BLOCK], 0.0, tl.float32)
    t_top = tl.full([BLOCK], LOWEST, tl.float32)
    t_total = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        s = _row(student, start + lanes, width, S_CAPPED)
        t = _row(teacher, start + lanes, width, T_CAPPED)
        s_top, s_total = _more(s_top, s_total, s)  # pyright: ignore[reportGeneralTypeIssues]
        t_top, t_total = _more(t_top, t_total, t)  # pyright: ignore[reportGeneralTypeIssues]
    return _lse(s_top, s_total), _lse(t_top, t_total)


@triton.jit
def row_statistics(
    s_ptr: tl.tensor,
    s_stride: int,
    s_filled: int,
    s_scale: float,
    s_cap: float,
    t_ptr: tl.tensor,
    t_stride: int,
    t_filled: int,
    t_scale: float,
    t_cap: float,
    ids_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    width: int,
    share: float,
    KIND: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Eight numbers of each row, in the order of `triton_rows.SUMS`. KIND "none" gives only the first four.
    They need one loop over the row; the others need normalised probabilities, and so a second one.
    """
    student = (s_ptr, s_stride, s_filled, s_scale, s_cap)
    teacher = (t_ptr, t_stride, t_filled, t_scale, t_cap)
    rows, lanes = tl.num_programs(0), tl.arange(0, BLOCK)
    sums_ptr += tl.program_id(0)
    s_lse, t_lse = _logsumexps(student, teacher, width, S_CAPPED, T_CAPPED, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    place = tl.load(ids_ptr + tl.program_id(0))
    tl.store(sums_ptr, s_lse)
    tl.store(sums_ptr + rows, t_lse)
    tl.store(sums_ptr + 2 * rows, _logp_at(student, place, s_lse, S_CAPPED))
    tl.store(sums_ptr + 3 * rows, _logp_at(teacher, place, t_lse, T_CAPPED))
    if KIND != "none":
        costs = tl.full([BLOCK], 0.0, tl.float32)
        slopes = tl.full([BLOCK], 0.0, tl.float32)
        kls = tl.full([BLOCK], 0.0, tl.float32)
        entropies = tl.full([BLOCK], 0.0, tl.float32)
        for start in range(0, width, BLOCK):
            s = _row(student, start + lanes, width, S_CAPPED) - s_lse
            t = _row(teacher, start + lanes, width, T_CAPPED) - t_lse
            p, q = tl.exp(s), tl.exp(t)
            gap = log_gap(s, t, p, q)
            cost, slope = terms(s, p, q, gap, share, KIND)  # pyright: ignore[reportGeneralTypeIssues]
            costs += cost
            slopes += slope
            entropies += tl.where(p == 0, 0.0, -p * s)
            # The compiler leaves this out where it is not stored.
            kls += kl_term(p, q, -gap)
        tl.store(sums_ptr + 4 * rows, tl.sum(costs, 0))
        tl.store(sums_ptr + 5 * rows, tl.sum(slopes, 0))
        tl.store(sums_ptr + 6 * rows, tl.sum(costs if KIND == "reverse" else kls, 0))
        tl.store(sums_ptr + 7 * rows, tl.sum(entropies, 0))


@triton.jit
def _with_token(d: tl.tensor, s: tl.tensor, token: tl.tensor, total: tl.tensor) -> tl.tensor:
    """token (1 - p) - (total - token) p where token is not 0. 1 - p must keep its digits."""
    return tl.where(token != 0, -token * expm1(s) - (total - token) * tl.exp(s), d)


@triton.jit
def row_gradient(
    s_ptr: tl.tensor,
    s_stride: int,
    s_filled: int,
    s_scale: float,
    s_cap: float,
    t_ptr: tl.tensor,
    t_stride: int,
    t_filled: int,
    t_scale: float,
    t_cap: float,
    ids_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    coefs_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    d_ptr: tl.tensor,
    d_stride: int,
    d_filled: int,
    width: int,
    share: float,
    KIND: tl.constexpr,
    TOKEN: tl.constexpr,
    TAIL: tl.constexpr,
    ADD: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient of `triton_rows.write_gradient`. It is 0 where the coefficients are 0, for any cost."""
    student = (s_ptr, s_stride, s_filled, s_scale, s_cap)
    teacher = (t_ptr, t_stride, t_filled, t_scale, t_cap)
    row, rows, lanes = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    sums_ptr += row
    coefs_ptr += row
    s_lse, t_lse, slopes = tl.load(sums_ptr), tl.load(sums_ptr + rows), tl.load(sums_ptr + 5 * rows)
    coef, token = tl.load(coefs_ptr), tl.load(coefs_ptr + rows)
    total, tail = tl.load(coefs_ptr + 2 * rows), tl.load(coefs_ptr + 3 * rows)
    rest, place = tl.load(rest_ptr + row), tl.load(ids_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + lanes
        x = _row(student, columns, width, S_CAPPED)
        s = x - s_lse
        p = tl.exp(s)
        d = tl.where(total == 0, 0.0, -total * p)
        if TOKEN:
            d = _with_token(d, s, tl.where(columns == place, token, 0.0), total)
        if KIND != "none":
            t = _row(teacher, columns, width, T_CAPPED) - t_lse
            q = tl.exp(t)
            _, slope = terms(s, p, q, log_gap(s, t, p, q), share, KIND)  # pyright: ignore[reportGeneralTypeIssues]
            d += tl.where(coef == 0, 0.0, coef * (slope - p * slopes))
        if TAIL:
            d += tl.where(tail == 0, 0.0, tail * tl.exp(x - rest))
        d *= s_scale * (1 - (x / s_cap) * (x / s_cap)) if S_CAPPED else s_scale
        places = d_ptr + row.to(tl.int64) * d_stride + columns
        if ADD:
            d += tl.load(places, mask=columns < d_filled, other=0.0).to(tl.float32)
        tl.store(places, d.to(d_ptr.dtype.element_ty), mask=columns < d_filled)
