"""Intervals and estimators for evaluations: Wilson, bootstrap over problems, clustered mean, pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion of n problems (E. B. Wilson, 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes / n. It is inside [0, 1], and its
    width is not 0 at 0 or n successes. confidence: the probability that such an interval contains the true
    proportion, 0.95 for 95%. `successes` may be a sum of partial verdicts in [0, 1]; the interval is then
    wider than needed. n = 0 gives (0, 1). Raises ValueError unless 0 <= successes <= n.
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
    # exact at the ends, where rounding would give 1e-17
    low = 0.0 if successes == 0 else (middle - half) / scale
    high = 1.0 if successes == n else (middle + half) / scale
    return low, high


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean. `values` holds one number per problem, and problems are
    resampled `resamples` times. confidence: as in `wilson`.

    Samples of one problem are not independent of each other, so they must be averaged before. The same seed
    gives the same interval. Equal values give an interval of width 0; `mean_interval` handles that
    case. Raises ValueError without values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"bootstrap_mean needs one number per problem, got shape {numbers.shape}")
    rng = np.random.default_rng(seed)
    means = [numbers[rng.integers(len(numbers), size=len(numbers))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def mean_interval(
    values: Sequence[float] | np.ndarray, seed: int, *, share: bool = False, confidence: float = 0.95
) -> tuple[float, float] | tuple[None, None]:
    """The confidence interval of the mean of `values`, one number per problem. If the numbers differ, this is
    the bootstrap interval (see `bootstrap_mean` for seed and confidence).

    If all n numbers are equal, the bootstrap interval would have width 0. share = True: every number is known
    to be in [0, 1], as verdicts, avg@n and pass@k are. Then n equal numbers have the Wilson interval with
    their sum as the number of successes. If each is 0 or 1, this is the interval of 0 or n successes.
    Otherwise it is wider than needed, because numbers that are all 0 or 1 have the largest variance of all
    numbers in [0, 1] with the same mean. With share = False, or outside [0, 1], equal numbers give (None,
    None), because their spread is not known. No numbers also give (None, None).
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return None, None
    first = float(numbers[0])
    if (numbers != first).any():
        return bootstrap_mean(numbers, seed, confidence=confidence)
    return (
        wilson(first * len(numbers), len(numbers), confidence) if share and 0 <= first <= 1 else (None, None)
    )


def clustered_mean(
    clusters: Sequence[np.ndarray], confidence: float = 0.95
) -> tuple[float | None, float | None, float | None]:
    """The mean over all numbers of all clusters, and the ends of its interval: (mean, low, high). confidence:
    as in `wilson`.

    Numbers of one cluster (the positions of one attempt) are not independent of each other, but clusters are
    independent. With sums s_i over n_i numbers, the mean r = sum_i s_i / sum_i n_i is a ratio of
    two means. Its interval is

        r -+ t * sqrt(m / (m - 1) * sum_i (s_i - r n_i)^2) / sum_i n_i

    with the quantile t of Student's distribution with m - 1 degrees of freedom, over the m clusters that hold
    a number. One cluster gives (mean, None, None), because the spread between clusters is not
    known. No number gives (None, None, None). Residuals that are all 0 (a student that is its own teacher)
    give width 0. Cochran, Sampling Techniques, 3rd edition, section 6.3 (ratio estimates) and 9A
    (unequal clusters).
    """
    filled = [cluster for cluster in clusters if len(cluster)]
    size, m = sum(len(cluster) for cluster in filled), len(filled)
    if not filled:
        return None, None, None
    mean = sum(float(cluster.sum()) for cluster in filled) / size
    if m < 2:
        return mean, None, None
    from scipy.special import stdtrit

    residuals = np.asarray([float((cluster - mean).sum()) for cluster in filled])
    half = (
        float(stdtrit(m - 1, 0.5 + confidence / 2))
        * math.sqrt(m / (m - 1) * float((residuals**2).sum()))
        / size
    )
    return mean, mean - half, mean + half


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that k of n attempts, drawn without replacement, include at least one of the c
    correct ones: 1 - C(n-c, k) / C(n, k).

    It is an unbiased estimate of the probability that at least one of k new attempts is correct (Chen et al.,
    arXiv:2107.03374); 1 - (1 - c/n)^k is biased. Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n = {n}, c = {c}, k = {k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
