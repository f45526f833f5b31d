"""The position from which the teacher no longer distinguishes the student's candidates, that is the student's
most likely tokens.

It is found in three steps: margins per position, their mean per segment, and one downward step in the scores
of the segments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The largest margin between two candidates, nats. A candidate with log-prob -inf counts as this far below the
# best one.
_MOST_NATS = 30.0
# Keeps the logarithm finite if the fit is perfect.
_EPSILON = 1e-12


def candidate_margin(teacher_logp_TK: np.ndarray) -> np.ndarray:
    """M_t = log q(a1) - log q(a2), float64 [T], nats, 0 <= M_t <= 30. a1 and a2 are the two of the student's
    K candidates that are most likely under the teacher.

    teacher_logp_TK: the teacher's log-probs at the candidates, nats, K >= 2, in any order. A constant added
    to a row changes nothing. A candidate with -inf counts as 30 nats below the best one, which is also the
    largest margin. A row without a finite value has margin 0. Fewer than two candidates, NaN or +inf:
    ValueError. arXiv 2605.13643 (without the bound).
    """
    logp_TK = np.asarray(teacher_logp_TK, dtype=np.float64)
    if logp_TK.ndim != 2 or logp_TK.shape[1] < 2:
        raise ValueError(
            "a margin needs at least two candidates: expected log-probs [T, K] with K >= 2, got shape "
            f"{logp_TK.shape}"
        )
    if np.isnan(logp_TK).any() or np.isposinf(logp_TK).any():
        raise ValueError(
            "the teacher's log-probs contain NaN or +inf; they must be finite or -inf (probability 0)"
        )
    two_T2 = np.partition(logp_TK, -2, axis=1)[:, -2:]
    with np.errstate(invalid="ignore"):
        # -inf - -inf is NaN. It occurs in a row without a finite value.
        gap_T = two_T2[:, 1] - two_T2[:, 0]
    return np.where(np.isneginf(two_T2[:, 1]), 0.0, np.minimum(gap_T, _MOST_NATS))


def segment_scores(margin_T: np.ndarray, segments: Sequence[slice]) -> list[float]:
    """S_i = log(1 + mean margin of segment i), one per segment, in order. margin_T: the margins of
    `candidate_margin`. No segments give [].

    A segment is a slice of positions with step 1. Raises ValueError with the index of a segment that is
    empty, out of order, overlapping or out of range.
    """
    return [math.log1p(mean) for mean in segment_margins(margin_T, segments)]


def segment_margins(margin_T: np.ndarray, segments: Sequence[slice]) -> list[float]:
    """The mean margin of each segment, nats. Arguments and raised errors are those of `segment_scores`."""
    last, means, margins = 0, [], np.asarray(margin_T, dtype=np.float64).tolist()
    for index, segment in enumerate(segments):
        start, stop = segment.start, segment.stop
        if not (
            isinstance(start, int)
            and isinstance(stop, int)
            and segment.step in (None, 1)
            and last <= start < stop <= len(margins)
        ):
            raise ValueError(
                f"segment {index} is {segment}: segments must be non-empty, in order, disjoint, and within "
                f"the {len(margins)} positions"
            )
        last = stop
        means.append(math.fsum(margins[start:stop]) / (stop - start))
    return means


@dataclass(frozen=True)
class Split:
    """The best downward step. `kept`: the number of segments before the step. gain = BIC_0 - BIC_1."""

    kept: int
    gain: float


def change_point(
    scores: Sequence[float], min_segments: int = 8, min_side: int = 3, min_gain: float = 0.0
) -> int | None:
    """The number tau* of segments before the step, if two means explain the scores better than one mean, else
    None.

    BIC_0 = n log((RSS_0 + 1e-12) / n) + log n for one mean. BIC_1(tau) = n log((RSS_1(tau) + 1e-12) / n) + 3
    log n for a mean of the first tau scores and a mean of the others. RSS is the sum of squared deviations
    from the mean or means. Only tau with mean(after) < mean(before) and min_side <= tau <= n - min_side are
    considered. tau* = argmin BIC_1, the first one on a tie. The segments after it are released if gain =
    BIC_0 - BIC_1(tau*) > min_gain.

    None if n < max(min_segments, 2 min_side), if all scores are equal, or if they never fall. A straight
    decline is split near its middle, so only an early tau* is evidence of a step. NaN or an infinite score,
    or a minimum below 1: ValueError. arXiv 2605.13643, which states no minimum sizes.
    """
    split = best_split(scores, min_segments, min_side)
    return split.kept if split is not None and split.gain > min_gain else None


def best_split(scores: Sequence[float], min_segments: int = 8, min_side: int = 3) -> Split | None:
    """The step with the least BIC_1, for any gain. None if no step is allowed. The arguments are those of
    `change_point`.
    """
    if min_segments < 1 or min_side < 1:
        raise ValueError(f"min_segments and min_side must be at least 1, got {min_segments} and {min_side}")
    scores = [float(score) for score in scores]
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"scores must be finite, got {scores}")
    n = len(scores)
    if n < min_segments:
        # n < 2 min_side needs no test here, because the list of tau is then empty.
        return None
    # before[k]: mean and RSS of the first k + 1 scores
    before = _running(scores)
    # after[k]: mean and RSS of the scores from index k on
    after = _running(scores[::-1])[::-1]
    fits = [
        (before[tau - 1][1] + after[tau][1] + _EPSILON, tau)
        for tau in range(min_side, n - min_side + 1)
        if after[tau][0] < before[tau - 1][0]
    ]
    if not fits:
        return None
    (fit_1, kept), fit_0 = min(fits), before[-1][1] + _EPSILON
    bic_0, bic_1 = (
        n * math.log(fit / n) + parameters * math.log(n) for fit, parameters in ((fit_0, 1), (fit_1, 3))
    )
    return Split(kept, bic_0 - bic_1)


def _running(scores: Sequence[float]) -> list[tuple[float, float]]:
    """(mean, RSS) of the first 1, 2, ... scores, by Welford's update. The RSS is never negative, and exactly
    0 for equal scores. The mean stays between the least and the greatest score, so scores that never fall get
    no step through rounding.
    """
    mean, rss, found = 0.0, 0.0, []
    for count, score in enumerate(scores, 1):
        off = score - mean
        mean = score if count == 1 else mean + off / count
        rss += off * (score - mean) if count > 1 else 0.0
        found.append((mean, rss))
    return found
