"""How well a number ranks right attempts above wrong ones: AUC, pairs at one prompt, intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# numbers of one block of resamples, so that the memory does not grow with their number
_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Ranking:
    """How a signal ranks attempts. A number that is not defined is None.

    auc: see `auc`. pairwise: the same over the pairs of a right and a wrong attempt at one prompt, each pair
    counted once. low, high: the ends of the bootstrap interval of each. pairs: the number of such pairs.
    prompts: the number of prompts that have one. attempts: the number of attempts. missing: the share of
    them that have no value; they are left out of everything else.
    """

    auc: float | None
    auc_low: float | None
    auc_high: float | None
    pairwise: float | None
    pairwise_low: float | None
    pairwise_high: float | None
    pairs: int
    prompts: int
    attempts: int
    missing: float


def auc(values: np.ndarray, right: np.ndarray) -> float | None:
    """The area under the ROC curve: the probability that a right attempt has a higher value than a wrong one,
    over all pairs of them, where equal values count half. 1 is a perfect order, 0 the reversed one.

    values: finite numbers, one for each attempt. right: True for each right attempt. None if there is no
    right attempt or no wrong one. Bamber, Journal of Mathematical Psychology 12 (1975).
    """
    return _defined(_auc_B(values, right)(np.ones((1, len(values))))[0])


def pairs_within(
    values: np.ndarray, right: np.ndarray, prompt: np.ndarray, prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each prompt, [P]: the pairs of a right and a wrong attempt at it that are ranked right, where equal
    values count half, and the number of all its pairs. values, right: as in `auc`. prompt: the index of each
    attempt's prompt, 0 <= index < `prompts`.
    """
    order = np.lexsort((values, prompt))
    values, right, prompt = values[order], right[order].astype(np.float64), prompt[order]
    right_P = np.bincount(prompt, right, prompts)
    wrong_P = np.bincount(prompt, 1 - right, prompts)
    if not len(values):
        return np.zeros(prompts), np.zeros(prompts)
    # Groups of equal values at one prompt.
    starts = _starts((values[1:] != values[:-1]) | (prompt[1:] != prompt[:-1]))
    right_G, wrong_G = np.add.reduceat(right, starts), np.add.reduceat(1 - right, starts)
    before_P = np.cumsum(wrong_P) - wrong_P
    below_G = np.cumsum(wrong_G) - wrong_G - before_P[prompt[starts]]
    won_P = np.bincount(prompt[starts], right_G * (below_G + wrong_G / 2), prompts)
    return won_P, right_P * wrong_P


def ranking(
    values: np.ndarray,
    right: np.ndarray,
    prompt: np.ndarray,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Ranking:
    """How `values` rank the attempts. A value that is not finite is missing. right: True for each right
    attempt. prompt: the index of its prompt, from 0.

    The intervals are percentiles of the bootstrap over prompts: a resample draws as many prompts as there
    are, with replacement, each with all its attempts, because attempts at one prompt are not independent.
    Resamples in which a number is not defined are left out of its interval. One prompt gives no interval.
    Where all resamples agree, as for a perfect order, the width is 0. The same seed gives the same resamples
    for every signal of the same attempts. seed: at least 0. confidence: 0.95 for 95 %. ValueError for unequal
    lengths and for no attempts.
    """
    if not len(values) or not len(values) == len(right) == len(prompt):
        raise ValueError(
            "a ranking needs a value, a verdict and a prompt for each attempt, got "
            f"{len(values)}, {len(right)} and {len(prompt)}"
        )
    prompts, known = int(prompt.max()) + 1, np.isfinite(values)
    values, right, prompt = values[known], right[known].astype(bool), prompt[known]
    won_P, pairs_P = pairs_within(values, right, prompt, prompts)
    of_all = _auc_B(values, right)
    found: list[np.ndarray] = []
    for counts_BP in _resampled(prompts, len(values), seed, resamples):
        found.append(np.stack([of_all(counts_BP[:, prompt]), _ratio(counts_BP @ won_P, counts_BP @ pairs_P)]))
    auc_B, pairwise_B = np.concatenate(found, axis=1)
    pairwise = _defined(_ratio(won_P.sum(keepdims=True), pairs_P.sum(keepdims=True))[0])
    return Ranking(
        auc(values, right),
        *(_interval(auc_B, confidence) if prompts > 1 else (None, None)),
        pairwise,
        *(_interval(pairwise_B, confidence) if prompts > 1 else (None, None)),
        pairs=int(pairs_P.sum()),
        prompts=int((pairs_P > 0).sum()),
        attempts=len(known),
        missing=float(1 - known.mean()),
    )


def _auc_B(values: np.ndarray, right: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from weights of the attempts, [B, N], to the AUC under each row of weights, [B]. NaN where
    it is not defined.
    """
    order = np.argsort(values, kind="stable")
    values, right = values[order], right[order].astype(np.float64)
    starts = _starts(values[1:] != values[:-1])

    def of(weight_BN: np.ndarray) -> np.ndarray:
        if not len(values):
            return np.full(len(weight_BN), np.nan)
        weight_BN = weight_BN[:, order]
        # G groups of equal values, in ascending order
        right_BG = np.add.reduceat(weight_BN * right, starts, axis=1)
        wrong_BG = np.add.reduceat(weight_BN * (1 - right), starts, axis=1)
        below_BG = np.cumsum(wrong_BG, axis=1) - wrong_BG
        won_B = (right_BG * (below_BG + wrong_BG / 2)).sum(axis=1)
        return _ratio(won_B, right_BG.sum(axis=1) * wrong_BG.sum(axis=1))

    return of


def _resampled(prompts: int, attempts: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each prompt was drawn in each resample, in blocks [B, P]. The numbers do not depend on the
    size of the blocks.
    """
    rng, size = np.random.default_rng(seed), max(1, _AT_ONCE // max(prompts, attempts))
    for start in range(0, resamples, size):
        drawn_BP = rng.integers(prompts, size=(min(size, resamples - start), prompts))
        rows = np.arange(len(drawn_BP))[:, None] * prompts
        yield np.bincount((rows + drawn_BP).ravel(), minlength=drawn_BP.size).reshape(drawn_BP.shape)


def _starts(changes: np.ndarray) -> np.ndarray:
    """The first index of each group, where changes[i] says that i + 1 begins another one."""
    return np.concatenate([[0], np.flatnonzero(changes) + 1])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return part / whole


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(found_B: np.ndarray, confidence: float) -> tuple[float | None, float | None]:
    known = found_B[~np.isnan(found_B)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
