"""Estimates of the noise and the mean of a gradient from M draws, using only inner products.

K_MM[i, j] = g_i . h_j for draws i of one gradient and j of another (or the same). Draws i and j are
independent for i != j, so the mean of the entries off the diagonal is an unbiased estimate of E[g] . E[h].
The entries on the diagonal contain the noise that both gradients share.

This file has no command of its own. Use `python studies/run.py STUDY --out OUT --variance`.
"""

from __future__ import annotations

import math

import numpy as np


def inner(one_MD: np.ndarray, other_MD: np.ndarray) -> np.ndarray:
    """K_MM in float64."""
    return one_MD.astype(np.float64) @ other_MD.astype(np.float64).T


def total_variance(K_MM: np.ndarray) -> float:
    """Trace of the covariance, unbiased: (mean |g|^2 - |mean g|^2) M / (M - 1)."""
    draws = len(K_MM)
    return float((K_MM.trace() - K_MM.sum() / draws) / (draws - 1))


def of_means(K_MM: np.ndarray) -> float:
    """E[g] . E[h], unbiased. For h = g it estimates |E[g]|^2, and noise can make the estimate negative. The
    plain |mean g|^2 would be larger by the variance / M.
    """
    draws = len(K_MM)
    return float((K_MM.sum() - K_MM.trace()) / (draws * (draws - 1)))


def cosine(one_MM: np.ndarray, cross_MM: np.ndarray, other_MM: np.ndarray) -> float:
    """The cosine of the expected gradients. NaN if a squared mean is not positive. Noise can make it
    exceed 1.
    """
    product = of_means(one_MM) * of_means(other_MM)
    return of_means(cross_MM) / math.sqrt(product) if product > 0 and of_means(one_MM) > 0 else math.nan


def at(K_MM: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return K_MM[np.ix_(kept, kept)]
