"""Importance-weighted on-policy distillation: a position weighs less, the more student and teacher disagreed
before it.
"""

from __future__ import annotations

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
from reflux.credit.share_credit import share_before
from reflux.types import Attempt, Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

IW_OPD = Paper(
    "iw_opd",
    "On the Position Bias of On-Policy Distillation",
    "2606.22600",
    2026,
    "Xie, Yan and Zhu, Sijie and Wen, Tiansheng and Chen, Bo and Wang, Yifei",
)


@dataclass(frozen=True, config=STRICT)
class Discrepancy(CreditPart):
    """Weight 1 + gamma (1 - F_t), where F_t is the share of the attempt's discrepancy that lies before
    position t.

    The discrepancy of a chosen position is d_t = |log q(a_t) - log p(a_t)|, nats, at the sampled token. F_t
    is the sum of d_k over earlier chosen positions k < t, divided by the sum over all chosen positions of the
    attempt. So the first chosen position weighs 1 + gamma, the weight never rises within an attempt, and no
    weight is below 1. Except at the first position F_t also depends, through the sum, on the token at t and
    on later ones, so with a sampled loss the expected gradient is not a weighted sum of the positions'. The
    text of tools and users adds nothing, and the sums go over all turns. Positions that the student did not
    choose keep weight 1. The weight is a constant: no gradient flows through it. It is not normalised, so a
    mean over tokens grows by a factor between 1 and 1 + gamma.

    It needs the teacher's log-probs of the sampled tokens alone, so any teacher will do. A local teacher
    computes them in one more pass through its head. `student`: the policy whose log-probs are used in d.
    "behaviour" is the policy that sampled. "now" is the current student, which with staleness needs one more
    forward pass. A token that one of the two models finds impossible has an infinite d; F_t is then the share
    of such tokens that lie before t. An attempt without any discrepancy has weight 1 + gamma everywhere. An
    attempt that the teacher did not score, or that ended in an error, has weight 1. Neutral: gamma = 0. Only
    for attempts made of tokens.

    Notes over scored attempts: `discrepancy` (mean of the finite d over chosen positions, nats) and
    `first_half` (the share of the chosen positions at which F is below one half). arXiv 2606.22600. The
    formula and gamma 0.5 are those of the authors' code, where gamma is the largest weight minus 1. Of the
    paper itself only the abstract and the introduction were available to us.
    """

    when: ClassVar[str] = (
        "Answers are long, and the student leaves the paths of the teacher on the way: early tokens weigh "
        "more, as far as the models disagree. Compare it with `credit.position`, whose weights do not depend "
        "on the models."
    )

    # the weight of the first position is 1 + gamma, and that after the last discrepancy is 1
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    student: Side = "behaviour"
    teacher: str = "main"

    gives_offsets = False
    min_group = 1

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (IW_OPD,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return ratio_refusals(where, self.teacher, self.student, cfg)

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return ratio_advice(where, self.student, cfg)

    @property
    def requirements(self) -> Requirements:
        return Requirements(logp=True, now_topk=int(self.student == "now"))

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        return [self._share(attempt) for attempt in group]

    def _share(self, attempt: Attempt) -> Credit:
        ratio_T, mask_T = log_ratio_T(attempt, self.teacher, self.student), attempt.rollout.mask_T
        if ratio_T is None or not mask_T.any():
            return Credit()
        before_N = share_before(np.abs(ratio_T[mask_T]))
        weight_T = np.ones(len(mask_T))
        weight_T[mask_T] = 1 + self.gamma * (1 - before_N)
        finite_N = np.abs(ratio_T[np.isfinite(ratio_T)])
        notes = {"discrepancy": float(finite_N.mean())} if len(finite_N) else {}
        return Credit(weight_T=weight_T, notes={**notes, "first_half": float((before_N < 0.5).mean())})
