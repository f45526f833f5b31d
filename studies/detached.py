"""The control of studies/flow.toml: the update that arXiv 2605.08063 prints, whose expected gradient is zero.

Use it as an objective: kind = "detached:Detached", with this folder on PYTHONPATH.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.loss.term import Rows
from reflux.objectives.base import ObjectivePart
from reflux.objectives.ratio import score_cost
from reflux.types import Target, VelocityTarget

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.loss.flow_outputs import VelocityOutputs


@dataclass(frozen=True, config=STRICT)
class Detached(ObjectivePart):
    """Reward r = -KL(student's step || teacher's step), detached; cost = -min(rho r, clip(rho) r) with rho
    the ratio of the sampled step.

    r depends on the state a step starts from and not on the step that was sampled there. E[grad log pi] = 0,
    so the expected product with r is 0 too.
    """

    teacher: str = "main"
    coef: float = 1.0
    clip: tuple[float, float] = (0.2, 0.2)

    takes_advantage_offset: ClassVar[bool] = False
    accepts: ClassVar[tuple[type[Target], ...]] = (VelocityTarget,)

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, rows: Rows[VelocityOutputs]) -> Tensor:
        reward_N = -rows.student.kl(rows.teachers[self.teacher])
        return score_cost(
            reward_N, rows.student.logp_N, rows.behaviour_logp_N, "clip", self.clip, ratio_cap=1.0
        )
