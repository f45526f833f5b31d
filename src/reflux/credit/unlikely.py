"""A fixed advantage at the tokens that the student itself found unlikely: a control without a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, kind_of
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.credit.share_credit import least_likely
from reflux.types import Attempt, Credit, Group, TokenRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

OPSA = Paper(
    "opsa",
    "Does On-Policy Distillation Really Distill? From Noisy Teacher to Self-Improvement",
    "2608.31046",
    2026,
    "Ding, Yi and Zhang, Ruqi",
)


@dataclass(frozen=True, config=STRICT)
class Unlikely(CreditPart):
    """Advantage offset `advantage` at the least likely chosen tokens of each attempt, and 0 at all others.

    Of the n chosen tokens of an attempt, the max(1, floor(`share` n)) with the lowest log-prob are taken;
    among equal log-probs the earlier token comes first. A taken token with a probability above
    `max_probability` gets 0 all the same. With `share` 1 the rule is a threshold on the probability alone.
    The probability is that of the policy that sampled, at temperature 1. The weight is not changed, and the
    text of tools and users is not counted.

    With objective `policy_gradient` this is a control: it has neither a teacher nor a reward, and only makes
    the student's own distribution narrower. What a method gains above it, it does not gain by that alone.
    With a mean over all chosen tokens the loss is about `share` times the mean over the taken tokens that the
    authors use. Neutral: advantage = 0. Only for attempts made of tokens.

    Notes over chosen tokens: `taken` (share with an offset) and `taken_nats` (mean of -log p over taken
    tokens). arXiv 2608.31046, where an advantage of -0.5 at 20 % of the tokens is reported to equal
    distillation, and +0.2 to collapse. The share, the advantage and the rounding are those of the authors'
    documentation of their code; the paper itself was not available to us. Their code takes the lowest share
    of all tokens of a process and not of each attempt, which depends on how a batch is divided. Their method
    OPSA, whose advantage also depends on the entropy, is not in this rule.
    """

    when: ClassVar[str] = (
        "As a control for a method of distillation: the same run without a teacher, in which only unlikely "
        "tokens become less likely."
    )

    # nats, at every taken token
    advantage: float = -0.5
    # the share of the chosen tokens of an attempt that are taken, from the lowest log-prob up
    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    # a token that is more likely than this has no offset
    max_probability: Annotated[float, Field(gt=0, le=1)] = 1.0

    gives_offsets = True
    min_group = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.advantage):
            raise ValueError(f"advantage must be a finite number of nats, got {self.advantage}")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (OPSA,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if cfg.sampler.rollouts is not TokenRollout:
            yield f"{where} compares the probabilities of tokens, and images have none. Remove the rule."
        elif not cfg.sampler.on_policy:
            yield (
                f"{where} reads the probabilities with which the student sampled, and this sampler "
                f"('{kind_of('samplers', cfg.sampler)}') gives answers that the student did not sample. Use "
                "sampler 'hf'."
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.advantage > 0:
            yield (
                f"{where}.advantage = {self.advantage:g} makes unlikely tokens more likely; a run with +0.2 "
                "is reported to collapse. The control has a negative advantage."
            )

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        return [self._share(attempt) for attempt in group]

    def _share(self, attempt: Attempt) -> Credit:
        rollout = attempt.rollout
        if rollout.finish == "error" or not rollout.mask_T.any():
            return Credit()
        taken_T = least_likely(rollout.policy_logp_T, rollout.mask_T, self.share, self.max_probability)
        notes = {"taken": float(taken_T.sum() / rollout.mask_T.sum())}
        if taken_T.any():
            notes["taken_nats"] = -float(rollout.policy_logp_T[taken_T].mean(dtype=np.float64))
        return Credit(advantage_offset_T=np.where(taken_T, self.advantage, 0.0), notes=notes)
