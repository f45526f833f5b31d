"""How far the student was from a teacher on a step's own attempts, by estimators that compute no row of any
model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reflux.metrics.values import Mean
from reflux.models.heads import Heads
from reflux.types import Attempt, VelocityTarget


def generated_kl(attempts: Sequence[Attempt], teacher: str) -> Mean:
    """Reverse KL of the student that acted to `teacher`, nats, over all positions that it generated, whatever
    they weigh.

    Of a text the mean of log p(a) - log q(a) over the sampled tokens, p being the distribution that was
    sampled from: unbiased, and noisy where the exact one is not. Of an image exact, step by step. Attempts
    the teacher did not answer are left out. Nothing is counted (value None) where a position of an answered
    attempt has no such number yet: a mean of the others would be one of other positions.
    """
    gaps: list[np.ndarray] = []
    for attempt in attempts:
        if attempt.target(teacher) is None:
            continue
        gap = _known_gap_T(attempt, teacher)
        if gap is None:
            return Mean()
        gaps.append(gap[attempt.rollout.mask_T])
    return Mean.of(np.concatenate(gaps) if gaps else [])


def trained_kl(attempts: Sequence[Attempt], teacher: str) -> Mean:
    """Mean of log p - log q over the positions learnt from, p being the student at this step: the sampled
    reverse KL, nats.
    """
    known = [
        attempt.learned.logp for attempt in attempts if attempt.learned and teacher in attempt.learned.logp
    ]
    gaps = [logp["student"] - logp[teacher] for logp in known]
    return Mean.of(np.concatenate([gap[np.isfinite(gap)] for gap in gaps]) if gaps else [])


def _known_gap_T(attempt: Attempt, teacher: str) -> np.ndarray | None:
    """KL at each position, float64; None where a position that the student chose has none."""
    target = attempt.target(teacher)
    if isinstance(target, VelocityTarget):
        behaviour = attempt.rollout.behaviour
        gap = None if behaviour is None else behaviour.kl_T(target, attempt.rollout, Heads())
        return gap if gap is not None else _recorded_kl_T(attempt, teacher)
    teacher_T = teacher_logp_T(attempt, teacher)
    if teacher_T is None or np.isnan(teacher_T[attempt.rollout.mask_T]).any():
        return None
    return attempt.rollout.logp_T.astype(np.float64) - teacher_T


def _recorded_kl_T(attempt: Attempt, teacher: str) -> np.ndarray | None:
    """What the step computed, where that was at every position the student chose."""
    kl_T = attempt.learned.kl_T if attempt.learned and teacher == "main" else None
    return None if kl_T is None or np.isnan(kl_T[attempt.rollout.mask_T]).any() else kl_T


def teacher_logp_T(attempt: Attempt, teacher: str) -> np.ndarray | None:
    """The teacher's log-probs of what was chosen, nats: what its answer holds, else what the step computed,
    NaN where neither does.

    None where there are none at all, as of an image whose answer holds velocities.
    """
    target = attempt.target(teacher)
    recorded_T = attempt.learned.logp.get(teacher) if attempt.learned else None
    answered_T = None if target is None else target.logp_T
    if answered_T is None:
        return recorded_T
    answered_T = np.where(attempt.rollout.mask_T, answered_T, np.float32(np.nan))
    return answered_T if recorded_T is None else np.where(np.isnan(recorded_T), answered_T, recorded_T)
