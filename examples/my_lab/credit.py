"""A custom credit rule: `kind = "my_lab.credit:Surprise"`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.teachers.names import unless_known
from reflux.types import Attempt, Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

RHO_1 = Paper(
    "rho_1", "Rho-1: Not All Tokens Are What You Need", "2404.07965", 2024, "Lin, Zhenghao and others"
)


@dataclass(frozen=True, config=STRICT)
class Surprise(CreditPart):
    """Weight 1 where the sampled token is unlikely under the teacher, -log q(a) >= `least_nats`; weight
    `elsewhere` at the other chosen positions.

    An attempt that the teacher did not score keeps weight 1. Neutral: elsewhere = 1. Note `surprising`: the
    share of chosen positions with weight 1. arXiv 2404.07965 trains on selected tokens too, with another
    score.
    """

    least_nats: float = 1.0
    elsewhere: float = 0.0
    teacher: str = "main"

    gives_offsets = False
    min_group = 1
    when: ClassVar[str] = (
        "The teacher agrees with most of an answer, and only tokens that are unlikely under it should count."
    )

    def __post_init__(self) -> None:
        if not self.least_nats >= 0:
            raise ValueError(f"least_nats is a surprise, so it must be 0 or more, got {self.least_nats}")
        if not self.elsewhere >= 0:
            raise ValueError(f"elsewhere is a weight, so it must be 0 or more, got {self.elsewhere}")

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return unless_known(cfg, f"{where}.teacher", self.teacher)

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.elsewhere == 1:
            yield f"{where}.elsewhere = 1 gives every position weight 1: this is the run without the rule."

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (RHO_1,)

    @property
    def requirements(self) -> Requirements:
        return Requirements(logp=True)

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        return [self._share(attempt) for attempt in group]

    def _share(self, attempt: Attempt) -> Credit:
        target, rollout = attempt.target(self.teacher), attempt.rollout
        teacher_T = getattr(target, "logp_T", None)
        if teacher_T is None or not rollout.mask_T.any():
            return Credit()
        surprising_T = -teacher_T >= self.least_nats
        weight_T = np.where(surprising_T | ~rollout.mask_T, 1.0, self.elsewhere).astype(np.float32)
        return Credit(weight_T=weight_T, notes={"surprising": float(surprising_T[rollout.mask_T].mean())})
