"""The terms of divergences and their derivatives at one token, for the kernels of `triton_kernels`. Importing
this module needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def _second(x: tl.tensor) -> tl.tensor:
    """(exp(x) - 1 - x) / x^2 for |x| < 1/8 by its Taylor series, to 1e-8."""
    return 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))


@triton.jit
def expm1(x: tl.tensor) -> tl.tensor:
    """exp(x) - 1 without cancellation."""
    return tl.where(tl.abs(x) < 0.125, x * (1 + x * _second(x)), tl.exp(x) - 1)


@triton.jit
def kl_term(p: tl.tensor, q: tl.tensor, over: tl.tensor) -> tl.tensor:
    """p log(p / q) - p + q with over = log(p / q): a KL whose terms are all >= 0.

    For probabilities the sum is the same. A rounding error of a logsumexp shifts all log-probs of a row. It
    enters the plain sum linearly and this sum squared, so a small divergence keeps its digits.
    """
    term = tl.where(tl.abs(over) < 0.125, p * over * over * _second(-over), p * over + (q - p))
    return tl.where(p == 0, q, term)


@triton.jit
def _mixed_terms(
    p: tl.tensor, q: tl.tensor, gap: tl.tensor, share: float, KIND: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(cost, slope) of the kinds that compare with m = (1 - share) p + share q; gap = log q - log p.

    log m is computed relative to the larger of log p and log q, so that a small gap loses no digits and
    equal models give exactly 0.
    """
    # Finite, so that its product with a probability of 0 is 0.
    gap = tl.minimum(tl.maximum(gap, -1e30), 1e30)
    above = tl.where(gap > 0, 1 - share, share)
    # Exactly 0 (log 1) where the gap is 0.
    m = tl.log(1 + above * (tl.exp(-tl.abs(gap)) - 1))
    # log p - log m
    p_over = tl.where(gap > 0, -gap - m, -m)
    q_over = tl.where(gap > 0, -m, gap - m)
    mixed = (1 - share) * p + share * q
    if KIND == "jsd":
        of_p = (1 - share) * p * p_over
        # The parts - p + m and - q + m of the two KLs cancel.
        near = share * q * q_over * q_over * _second(-q_over) + of_p * p_over * _second(-p_over)
        cost = tl.where(tl.abs(gap) < 0.125, near, share * q * q_over + of_p)
        slope = of_p
    elif KIND == "skew_reverse":
        cost = kl_term(p, mixed, p_over)
        slope = tl.where(p == 0, 0.0, p * (p_over - (1 - share) * expm1(p_over)))
    else:
        cost = kl_term(q, mixed, q_over)
        slope = tl.where(p == 0, 0.0, -(1 - share) * p * expm1(q_over))
    return cost, slope


@triton.jit
def terms(
    s: tl.tensor, p: tl.tensor, q: tl.tensor, gap: tl.tensor, share: float, KIND: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The term of one token in the row's divergence, and the derivative of the term by log p. s = log p of
    the student, q of the teacher, gap = log q - log p.

    The derivative is given up to a multiple of p, which the derivative of the softmax removes. The multiple
    is chosen so that the derivative is 0 where p = q. A probability of 0 adds 0. Columns beyond the row add
    0 too, because both probabilities are 0 there. KIND "moments" is (p (1 - p), p (1 - p) gap).
    """
    if KIND == "moments":
        cost = -p * expm1(s)
        slope = tl.where(cost == 0, 0.0, cost * gap)
    elif KIND == "reverse":
        cost = kl_term(p, q, -gap)
        slope = tl.where(p == 0, 0.0, -p * gap)
    elif KIND == "forward":
        cost = kl_term(q, p, gap)
        slope = p - q
    elif KIND == "tv":
        cost = 0.5 * tl.abs(p - q)
        slope = p * tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))
    elif KIND == "alpha":
        drop = -tl.abs(gap)
        weight = tl.where(gap > 0, share, 1 - share)
        whole = expm1(drop)
        part = expm1(weight * drop)
        cost = tl.maximum(p, q) * (weight * whole - part) * (1 / (share * (1 - share)))
        slope = tl.maximum(p, q) * tl.where(gap > 0, whole - part, -part) * (1 / (1 - share))
    else:
        cost, slope = _mixed_terms(p, q, gap, share, KIND)  # pyright: ignore[reportGeneralTypeIssues]
    return cost, slope


@triton.jit
def log_gap(s: tl.tensor, t: tl.tensor, p: tl.tensor, q: tl.tensor) -> tl.tensor:
    """log q - log p, and 0 where both probabilities are 0: this avoids inf - inf."""
    return tl.where((p == 0) & (q == 0), 0.0, t - s)
