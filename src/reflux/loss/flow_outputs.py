"""The outputs of a flow model at N denoising steps; the counterpart of `outputs.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reflux.models.flow.sde import kl_weight, step_logp, step_moments, wide


@dataclass
class VelocityOutputs:
    """A model's velocity at the states of N sampled denoising steps. Everything but the velocity is a
    constant.
    """

    v_ND: Tensor
    # the state that each step started from
    x_ND: Tensor
    # the state that was sampled
    next_ND: Tensor
    # the time of x, in (0, 1]
    t_N: Tensor
    # the time difference of the step, < 0
    dt_N: Tensor
    noise_level_N: Tensor

    @cached_property
    def logp_N(self) -> Tensor:
        """Log-density of the sampled state under this model's step, nats, summed over D; differentiable.
        ValueError at noise level 0.

        The rounding error of a difference of two log-densities is about 1e-7 times the larger of sqrt(D)
        and |logp|.
        """
        with torch.set_grad_enabled(self.v_ND.requires_grad):
            # The tensor is cached, so it keeps its graph even if the first access happens under no_grad.
            mean_ND, std_N1 = step_moments(
                self.x_ND, self.v_ND, *(column_N[:, None] for column_N in self._step())
            )
            return step_logp(self.next_ND, mean_ND, std_N1)

    def gap(self, teacher: VelocityOutputs) -> Tensor:
        """v - v_teacher, [N, D], differentiable in this model only; in float32 or wider."""
        return wide(self.v_ND) - wide(teacher.v_ND.detach())

    @torch.no_grad()
    def kl(self, teacher: VelocityOutputs) -> Tensor:
        """KL(this || teacher), nats [N], >= 0, detached. This is the cost of `velocity_kl`, for the
        records.
        """
        return kl_weight(*self._step()) * self.gap(teacher).square().sum(-1)

    def _step(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.t_N, self.dt_N, self.noise_level_N
