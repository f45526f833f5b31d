"""The exact gradient of the KL of a whole trajectory, for studies/flow.toml. This rule gives the term that
the direct form leaves out, as advantage offsets for `policy_gradient`.

Use it as a credit rule: kind = "trajectory:Later", with this folder on PYTHONPATH.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.models.flow.sde import kl_weight
from reflux.types import Attempt, Credit, FlowRollout, Group, VelocityTarget


@dataclass(frozen=True, config=STRICT)
class Later(CreditPart):
    """Advantage offset of step t = -(sum of KL(student || teacher) over the LATER counted steps, in nats),
    minus the mean of the same quantity over the group's OTHER attempts.

    It gives no weights.

    With velocity_kl and objective `policy_gradient` at the same coef the loss has the gradient
    sum_t [ grad KL_t + grad log pi_t * sum_(s > t) KL_s ], which is the gradient of the expected sum of KL
    along the student's trajectories. An attempt that is alone in its group has no mean subtracted.
    """

    teacher: str = "main"

    gives_offsets: ClassVar[bool] = True
    min_group: ClassVar[int] = 1

    @property
    def requirements(self) -> Requirements:
        return Requirements(behaviour=1)

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        later = [self._later(attempt) for attempt in group]
        known = [later_T for later_T in later if later_T is not None]
        others = max(1, len(known) - 1)
        return [
            Credit() if own_T is None else Credit(advantage_offset_T=(sum(known) - own_T) / others - own_T)
            for own_T in later
        ]

    def _later(self, attempt: Attempt) -> np.ndarray | None:
        rollout, target = attempt.rollout, attempt.target(self.teacher)
        if not (
            isinstance(rollout, FlowRollout)
            and isinstance(rollout.behaviour, VelocityTarget)
            and isinstance(target, VelocityTarget)
        ):
            return None
        gap_T = ((rollout.behaviour.v_TD - target.v_TD).astype(np.float64) ** 2).sum(-1)
        t_T, dt_T = rollout.t_S[:-1].astype(np.float64), np.diff(rollout.t_S.astype(np.float64))
        kl_T = np.where(rollout.mask_T, kl_weight(t_T, dt_T, rollout.noise_level) * gap_T, 0.0)
        return kl_T[::-1].cumsum()[::-1] - kl_T
