"""Shares of an attempt: its least likely positions, and the part of a sum that lies before each position."""

from __future__ import annotations

import math

import numpy as np


def least_likely(
    logp_T: np.ndarray, mask_T: np.ndarray, share: float, max_probability: float = 1.0
) -> np.ndarray:
    """True at the max(1, floor(share * n)) of the n positions in mask_T with the lowest log-prob, without
    those whose probability is above max_probability; bool, [T].

    Among equal log-probs the earlier position comes first. Without a position in mask_T: False everywhere.
    logp_T: nats.
    """
    chosen_N = np.flatnonzero(mask_T)
    # the small term keeps a product such as 0.29 * 100 from falling below the integer that it stands for
    count = max(1, math.floor(share * len(chosen_N) + 1e-9))
    lowest_N = chosen_N[np.argsort(logp_T[chosen_N], kind="stable")[:count]]
    taken_T = np.zeros(len(mask_T), dtype=bool)
    taken_T[lowest_N] = max_probability == 1 or logp_T[lowest_N] <= math.log(max_probability)
    return taken_T


def share_before(discrepancy_N: np.ndarray) -> np.ndarray:
    """The share of the sum of discrepancy_N that lies before each position; float64, [N], in [0, 1].

    If some values are infinite, all count alike and the finite ones not at all: the limit in which the
    infinite ones grow together. NaN counts as 0. If the sum is 0, the share is 0. discrepancy_N: >= 0.
    """
    infinite_N = np.isinf(discrepancy_N)
    d_N = (
        infinite_N.astype(np.float64) if infinite_N.any() else np.nan_to_num(discrepancy_N.astype(np.float64))
    )
    up_to_N = np.cumsum(d_N)
    if not len(d_N) or not up_to_N[-1] > 0:
        return np.zeros(len(d_N))
    return np.concatenate([[0.0], up_to_N[:-1]]) / up_to_N[-1]
