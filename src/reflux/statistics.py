"""Intervals and estimators for evaluations: Wilson, bootstrap over problems, pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share of n problems (E. B. Wilson, 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes / n. Never outside [0, 1], and never of width 0 at 0 or n
    successes. `successes` may be a sum of partial verdicts in [0, 1], for which the interval is wider than needed. n = 0: nothing is
    known, (0, 1). ValueError where successes are not between 0 and n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n = {n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (middle - half) / scale  # exact at the ends, where rounding would leave 1e-17
    high = 1.0 if successes == n else (middle + half) / scale
    return low, high


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int, resamples: int = 2000, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the mean, with problems drawn anew: `values` holds one number per problem.

    Samples of one problem are not independent of each other, so they must be averaged before. The same seed gives the same interval.
    Equal values give an interval of width 0 (nothing varies that could be drawn): for one verdict per problem use `wilson`. ValueError
    without values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"bootstrap_mean needs one number per problem, got shape {numbers.shape}")
    dice = np.random.default_rng(seed)
    means = [numbers[dice.integers(len(numbers), size=len(numbers))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n attempts, drawn without replacement, hold at least one of the c right ones: 1 - C(n-c, k) / C(n, k).

    Unbiased for "at least one of k fresh attempts is right" (Chen et al., arXiv:2107.03374); 1 - (1 - c/n)^k is not.
    ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n = {n}, c = {c}, k = {k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
