"""The log-ratio of teacher and student at the sampled tokens. Returns and margins are computed from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from reflux.config.registry import kind_of
from reflux.teachers.names import unless_known
from reflux.types import Attempt

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

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


def ratio_refusals(where: str, teacher: str, student: Side, cfg: RunConfig) -> Iterator[str]:
    """The reasons to refuse a rule that reads this log-ratio, each with its remedy. where: the path of the
    rule in the recipe.
    """
    yield from unless_known(cfg, f"{where}.teacher", teacher)
    if student == "behaviour" and not cfg.sampler.on_policy:
        yield (
            f"{where} compares the teacher with the log-probs of the student that sampled, and this sampler "
            f"('{kind_of('samplers', cfg.sampler)}') gives answers that the student did not sample. Use "
            f'student = "now".'
        )


def ratio_advice(where: str, student: Side, cfg: RunConfig) -> Iterator[str]:
    """Advice for a rule that reads this log-ratio, where the policy that sampled may be an old one."""
    if student == "behaviour" and cfg.max_staleness:
        yield (
            f'{where}: student = "behaviour" compares with the student of up to {cfg.max_staleness} '
            'steps ago; see "now".'
        )
