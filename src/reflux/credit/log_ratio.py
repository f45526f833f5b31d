"""How much more likely a teacher finds the tokens that were sampled than the student does: what returns and
margins are made of.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from reflux.types import Attempt

Side = Literal["behaviour", "now"]


def log_ratio_T(attempt: Attempt, teacher: str, student: Side = "behaviour") -> np.ndarray | None:
    """r_t = log q(a_t) - log p(a_t), float64 nats; NaN where the student did not choose. None where the
    attempt ended in an error or the teacher said nothing about it.

    Both sides are at temperature 1, also where attempts were sampled at another temperature or with top-p: r
    compares the two policies, whatever was drawn from. Only an importance ratio divides by the probability
    that a token was drawn with (`objectives.ratio`).

    student: "behaviour" as it stood when it acted (no extra pass; equal to now at staleness 0 up to
    numerics), "now" the student of this step. Raises ValueError where the teacher's log-probs of the sampled
    tokens were not asked for at scoring time (`Requirements(logp=True)`), or those of the student of now
    (`Requirements(now_topk=1)`).
    """
    rollout, target = attempt.rollout, attempt.target(teacher)
    if target is None or rollout.finish == "error":
        return None
    if target.logp_T is None:
        raise ValueError(
            f"this needs what teacher '{teacher}' gave the sampled tokens of prompt {rollout.prompt.id}, but "
            "its target holds no logp_T. "
            f"Ask for it at scoring time: `Requirements(logp=True)` in `wants`."
        )
    if student == "now":
        if attempt.now is None or attempt.now.logp_T is None:
            raise ValueError(
                f"prompt {rollout.prompt.id} has no log-probs of the student of now: "
                "`Requirements(now_topk=1)` in `wants` asks for them"
            )
        own_T = attempt.now.logp_T
    else:
        own_T = rollout.policy_logp_T
    with np.errstate(invalid="ignore"):
        # -inf - -inf is NaN: a token without a say, as one that was not chosen
        return np.where(rollout.mask_T, target.logp_T.astype(np.float64) - own_T, np.nan)
