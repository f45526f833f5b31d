"""On-policy distillation with verifiable reward: a token counts only where the teacher and the verifier pull
in the same direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.credit.log_ratio import Side, log_ratio_T
from reflux.credit.log_ratio_rules import ratio_advice, ratio_refusals
from reflux.rewards.base import unlike_threshold
from reflux.types import Attempt, Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

OPDVR = Paper(
    "opdvr",
    "On-policy Distillation with Verifiable Reward",
    "2608.24696",
    2026,
    "Lin, Wenze and Zhao, Jiale and Jiang, Xitai and others",
)
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class SignGate(CreditPart):
    """Weight `conflicting` on tokens that the teacher would push against the verdict, and `agreeing` on
    others.

    r = log q(a) - log p(a) is the log-ratio of teacher and student at the sampled token. A token conflicts
    where the attempt is correct and r < 0, because distillation would make a token of a correct attempt less
    likely, and where the attempt is wrong and r > 0. With objective `sampled_kl`, baseline "none" and the
    default weights, the advantage of a token is max(0, r) in a correct attempt and min(0, r) in a wrong one:
    the verdict decides the direction and the teacher the size. With a baseline, or with an exact divergence,
    the rule only chooses positions, and the sampled token decides which.

    An attempt is correct if its reward is at least `threshold`. An attempt that was not judged, that the
    teacher did not score, or that ended in an error keeps weight 1, and so does the text of tools and users.
    No comparison within a group is made, so one attempt per prompt is enough. `student`: the policy whose
    log-probs are used in r, as in `margin`. With loss_aggregation "token-mean-weighted" conflicting tokens of
    weight 0 are not counted in the denominator. Neutral: agreeing = conflicting = 1. `agreeing` 0 with
    `conflicting` 1 is the inverse gate, the paper's ablation. To leave out whole attempts instead, `balance`
    with ratio inf keeps the correct ones only, and with ratio 0 the wrong ones.

    Only for attempts made of tokens. Note `conflicting`: the share of the chosen tokens of judged and scored
    attempts that conflict. arXiv 2608.24696 (OPDVR). The formula is taken from published descriptions of the
    paper, which agree; the paper itself was not available to us. Its variant GRPD takes the sign of the group
    advantage instead of the verdict. For verdicts of 0 and 1 that differs only in groups that are all correct
    or all wrong, which GRPD leaves out.
    """

    when: ClassVar[str] = (
        "There are a verifier and a teacher that gives log-probs of the sampled tokens, and the teacher may "
        "be wrong, or the student may be better than it in places."
    )

    # weight of tokens whose direction agrees with the verdict, or that have none (r = 0)
    agreeing: Weight = 1.0
    # weight of tokens whose direction is against the verdict
    conflicting: Weight = 0.0
    # the least reward of a correct attempt
    threshold: float = 0.5
    student: Side = "behaviour"
    teacher: str = "main"

    gives_offsets = False
    min_group = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite reward, got {self.threshold}")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (OPDVR,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return ratio_refusals(where, self.teacher, self.student, cfg)

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        yield from ratio_advice(where, self.student, cfg)
        yield from unlike_threshold(where, self.threshold, cfg.rewards)
        if not (self.agreeing and self.conflicting) and cfg.loss_aggregation == "token-mean-weighted":
            yield (
                f'{where} with loss_aggregation = "token-mean-weighted": the tokens that stay count for '
                'more; see "token-mean".'
            )

    @property
    def requirements(self) -> Requirements:
        return Requirements(reward=True, logp=True, now_topk=int(self.student == "now"))

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        return [self._share(attempt) for attempt in group]

    def _share(self, attempt: Attempt) -> Credit:
        verdict, mask_T = attempt.verdict, attempt.rollout.mask_T
        ratio_T = log_ratio_T(attempt, self.teacher, self.student)
        if verdict is None or ratio_T is None or not mask_T.any():
            return Credit()
        # False where r is NaN, as it is where the student did not choose
        against_T = ratio_T < 0 if verdict >= self.threshold else ratio_T > 0
        weight_T = np.where(against_T, self.conflicting, self.agreeing)
        return Credit(
            weight_T=np.where(mask_T, weight_T, 1.0), notes={"conflicting": float(against_T[mask_T].mean())}
        )
