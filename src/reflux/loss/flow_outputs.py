"""What a flow model says at N denoising steps; the counterpart of `outputs.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reflux.models.flow.sde import kl_weight, step_logp, step_moments, wide


@dataclass
class VelocityOutputs:
    """A model's velocity at the states of N denoising steps that were drawn. Everything but the velocity is a
    constant.
    """

    v_ND: Tensor
    # the state each step started from
    x_ND: Tensor
    # the state that was drawn
    next_ND: Tensor
    # time of x, in (0, 1]
    t_N: Tensor
    # below 0
    dt_N: Tensor
    noise_level_N: Tensor

    @cached_property
    def logp_N(self) -> Tensor:
        """Log-density of the drawn state under this model's step, nats, summed over D; differentiable.
        ValueError at noise level 0.

        Two of them differ by a rounding of about 1e-7 times the square root of D, or of |logp| where that is
        more.
        """
        with torch.set_grad_enabled(self.v_ND.requires_grad):
            # made once for all, also where the first to ask wanted no graph
            mean_ND, std_N1 = step_moments(
                self.x_ND, self.v_ND, *(column_N[:, None] for column_N in self._step())
            )
            return step_logp(self.next_ND, mean_ND, std_N1)

    def gap(self, teacher: VelocityOutputs) -> Tensor:
        """v - v_teacher, [N, D], differentiable in this model only; in float32 or wider."""
        return wide(self.v_ND) - wide(teacher.v_ND.detach())

    @torch.no_grad()
    def kl(self, teacher: VelocityOutputs) -> Tensor:
        """KL(this || teacher), nats [N], >= 0, detached; what `velocity_kl` costs, for records."""
        return kl_weight(*self._step()) * self.gap(teacher).square().sum(-1)

    def _step(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.t_N, self.dt_N, self.noise_level_N
