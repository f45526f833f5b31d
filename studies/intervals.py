"""Estimates with 95 % intervals: Student's t over seeds, the jackknife over draws.

This file has no command of its own. Use studies/run.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval. low and high are None if there is only one value."""

    value: float
    low: float | None
    high: float | None
    n: int


def t_quantile(n: int, confidence: float = 0.95) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, n - 1))


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean ± t_{n-1} s / sqrt(n), with s^2 the unbiased variance. None without values."""
    n = len(values)
    if not n:
        return None
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, None, None, 1)
    half = t_quantile(n) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def jackknife(statistic: Callable[[np.ndarray], float], draws: int, log: bool = False) -> Estimate:
    """`statistic(kept)` of the indices of the kept draws, with a t interval from leaving out one draw at a
    time.

    se^2 = (M - 1)/M sum_i (s_i - mean s)^2 (Tukey 1958). log: the interval is computed for log s, which suits
    a ratio of positive numbers. There is no interval if the statistic is not finite (or, with log, not
    positive) when some draw is left out.
    """
    everything = np.arange(draws)
    value = statistic(everything)
    left_out = np.array([statistic(np.delete(everything, i)) for i in range(draws)])
    usable = np.isfinite([value, *left_out]).all() and (not log or min(value, left_out.min()) > 0)
    if not usable:
        return Estimate(value, None, None, draws)
    scaled = np.log(left_out) if log else left_out
    half = t_quantile(draws) * math.sqrt((draws - 1) / draws * float(np.square(scaled - scaled.mean()).sum()))
    return (
        Estimate(value, value * math.exp(-half), value * math.exp(half), draws)
        if log
        else Estimate(value, value - half, value + half, draws)
    )
