"""The KL between student and teacher on the attempts of a step, from recorded values, without
running a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reflux.metrics.values import Mean
from reflux.models.heads import Heads
from reflux.types import Attempt, TokenRollout, VelocityTarget


def generated_kl(attempts: Sequence[Attempt], teacher: str) -> Mean:
    """Reverse KL from the student that sampled to `teacher`, in nats, as a mean over all positions that the
    student generated, whatever their weight.

    For a text: the mean of log p(a) - log q(a) over the sampled tokens, where p is the distribution that was
    sampled from. This is unbiased, but noisier than the exact KL. For an image: the exact KL of each step.
    Attempts that the teacher did not answer are left out. If a position of an answered attempt has
    no value yet, nothing is counted (value None), because a mean over the other positions would not
    be comparable.
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
    """The sampled reverse KL to `teacher`, nats: the mean of log p - log q over the positions of the attempts
    that were trained on, where p is the student at this step.
    """
    known = [
        attempt.learned.logp for attempt in attempts if attempt.learned and teacher in attempt.learned.logp
    ]
    gaps = [logp["student"] - logp[teacher] for logp in known]
    return Mean.of(np.concatenate([gap[np.isfinite(gap)] for gap in gaps]) if gaps else [])


def sampled_entropy(attempts: Sequence[Attempt]) -> Mean:
    """The entropy of the student that sampled, nats per token: the mean of -log p(a) over the sampled tokens,
    at temperature 1 without top-p.

    It is unbiased where the tokens were sampled at temperature 1 without top-p. Images count nothing, because
    the entropy of a density has no lowest value.
    """
    return Mean.of(
        np.concatenate(
            [
                -attempt.rollout.policy_logp_T[attempt.rollout.mask_T].astype(np.float64)
                for attempt in attempts
                if isinstance(attempt.rollout, TokenRollout)
            ]
            or [[]]
        )
    )


def teacher_nats(attempts: Sequence[Attempt], teacher: str) -> dict[str, float] | None:
    """The mean and the standard deviation of -log q(a) over the sampled tokens, nats, as `mean` and `std`. q
    is `teacher`. None for images, and where no log-prob of the teacher is known.
    """
    known = [
        logp_T[attempt.rollout.mask_T]
        for attempt in attempts
        if isinstance(attempt.rollout, TokenRollout)
        and (logp_T := teacher_logp_T(attempt, teacher)) is not None
    ]
    nats = -np.concatenate(known or [[]]).astype(np.float64)
    nats = nats[np.isfinite(nats)]
    return {"mean": float(nats.mean()), "std": float(nats.std())} if len(nats) else None


def _known_gap_T(attempt: Attempt, teacher: str) -> np.ndarray | None:
    """KL at each position, float64; None if it is missing at a position that the student chose."""
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
    """The KL that the optimiser step computed; None if it is missing at a position that the student chose."""
    kl_T = attempt.learned.kl_T if attempt.learned and teacher == "main" else None
    return None if kl_T is None or np.isnan(kl_T[attempt.rollout.mask_T]).any() else kl_T


def teacher_logp_T(attempt: Attempt, teacher: str) -> np.ndarray | None:
    """The teacher's log-probs of the sampled tokens or denoising steps, nats: those that the optimiser step
    computed, otherwise those of the teacher's answer, NaN where both are missing.

    None if there are none at all, as for an image, whose answer holds velocities.
    """
    target = attempt.target(teacher)
    recorded_T = attempt.learned.logp.get(teacher) if attempt.learned else None
    answered_T = None if target is None else target.logp_T
    if answered_T is None:
        return recorded_T
    answered_T = np.where(attempt.rollout.mask_T, answered_T, np.float32(np.nan))
    return answered_T if recorded_T is None else np.where(np.isnan(recorded_T), answered_T, recorded_T)
