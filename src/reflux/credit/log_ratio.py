"""The log-ratio of teacher and student at the sampled tokens. Returns and margins are computed from it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from reflux.types import Attempt

Side = Literal["behaviour", "now"]


def log_ratio_T(attempt: Attempt, teacher: str, student: Side = "behaviour") -> np.ndarray | None:
    """r_t = log q(a_t) - log p(a_t), float64, nats, NaN where the student did not choose the token. None if
    the attempt ended in an error, or if the teacher gave no target for the attempt.

    q (teacher) and p (student) are at temperature 1, even if attempts were sampled at another temperature or
    with top-p, because r compares the two policies. Only an importance ratio uses the probability with which
    a token was drawn (`objectives.ratio`).

    student: "behaviour" is the policy that sampled. It needs no extra forward pass, and at staleness 0 it
    equals "now" up to numerics. "now" is the student of this step. Raises ValueError if the teacher's
    log-probs of the sampled tokens are missing, because no part required them (`Requirements(logp=True)`),
    or if those of the current student are missing (`Requirements(now_topk=1)`).
    """
    rollout, target = attempt.rollout, attempt.target(teacher)
    if target is None or rollout.finish == "error":
        return None
    if target.logp_T is None:
        raise ValueError(
            f"this needs the log-probs of teacher '{teacher}' at the sampled tokens of prompt "
            f"{rollout.prompt.id}, but its target has no logp_T. Add `Requirements(logp=True)` to the "
            "`requirements` of the part."
        )
    if student == "now":
        if attempt.now is None or attempt.now.logp_T is None:
            raise ValueError(
                f"prompt {rollout.prompt.id} has no log-probs of the current student. Add "
                "`Requirements(now_topk=1)` to the `requirements` of the part"
            )
        own_T = attempt.now.logp_T
    else:
        own_T = rollout.policy_logp_T
    with np.errstate(invalid="ignore"):
        # -inf - -inf is NaN. Such a token is treated as one that was not chosen.
        return np.where(rollout.mask_T, target.logp_T.astype(np.float64) - own_T, np.nan)
