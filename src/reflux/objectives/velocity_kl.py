"""The differentiable KL between two Gaussian denoising steps: a weighted squared difference of velocities, in
nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.loss.term import Rows
from reflux.models.flow.sde import kl_weight
from reflux.objectives.base import ObjectivePart
from reflux.objectives.sampled_kl import check_coef
from reflux.samplers.flow import without_noise
from reflux.teachers.names import tables_of
from reflux.types import FlowRollout, VelocityTarget

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.config.recipe import RunConfig
    from reflux.loss.flow_outputs import VelocityOutputs

FLOW_OPD = Paper(
    "flow_opd",
    "Flow-OPD: On-Policy Distillation for Flow Matching Models",
    "2605.08063",
    2026,
    "Fang, Zhen and Huang, Wenxuan and Zeng, Yu and Zhao, Yiming and Chen, Shuang and others",
)


@dataclass(frozen=True, config=STRICT)
class VelocityKL(ObjectivePart):
    """KL(student's denoising step || teacher's) at the states that the student visited.

    At each state both steps are Gaussians of the same width. The KL is therefore cost = w |v_student -
    v_teacher|^2 in nats, summed over the D latent values, with w = `kl_weight(t, dt, noise_level)`. It is 0
    at identity (student = teacher). The gradient flows through the student's velocity at that state. States
    are constants: the effect of a step on later states is ignored (the gradient of discount 0). Two of these
    objectives, one with teacher `main` and one with a frozen reference model as teacher `anchor`, are
    Flow-OPD with its anchor (MAR, arXiv 2605.08063).

    The paper prints another form: reward -w |sg(v_student) - v_teacher|^2 at each step, with the gradient
    through the importance ratio alone. That reward does not depend on the step that was drawn, so its
    expected gradient is 0. The released code leaves the KL in the graph. Its gradient is therefore the one of
    this objective plus noise with mean 0.

    `scale` nats: as above. released: as in the paper's code, a mean over D without dt, which is the KL times
    |dt| / D. Published learning rates and magnitudes can then be compared. On a grid of unequal steps this
    weighs the steps differently. `weight` kl: as above. mse: the mean over D of the squared difference,
    without w (arXiv 2606.27377). It is not a divergence. It is the only form that is defined at noise level
    0, where the KL is infinite.
    """

    teacher: str = "main"
    coef: float = 1.0
    scale: Literal["nats", "released"] = "nats"
    weight: Literal["kl", "mse"] = "kl"

    takes_advantage_offset: ClassVar[bool] = False
    remedy: ClassVar[str] = (
        'This objective compares flow models; for texts use kind = "divergence" or "sampled_kl"'
    )
    accepts = (VelocityTarget,)

    def __post_init__(self) -> None:
        check_coef(self.coef)
        if self.scale == "released" and self.weight == "mse":
            raise ValueError("scale = 'released' scales the KL, and weight = 'mse' has no KL: remove scale")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (FLOW_OPD,) if cfg.sampler.on_policy else ()

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        why = without_noise(cfg)
        if why and self.weight == "kl" and cfg.task.rollouts is FlowRollout:
            remedy = ", or a noise_level above 0, such as 0.7" if cfg.sampler.on_policy else ""
            yield f'{where}: {why}, so the KL is infinite. Use weight = "mse"{remedy}.'

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        yield from self._two_scales(cfg)
        yield from self._heard_twice(cfg)

    def _two_scales(self, cfg: RunConfig) -> Iterator[str]:
        """Advice if one objective uses scale "released" and another does not, because their coefs are not
        comparable. Only the first objective with scale "released" gives it, so it appears once.
        """
        released = [
            isinstance(objective, VelocityKL) and objective.scale == "released"
            for objective in cfg.objectives
        ]
        if any(released) and not all(released) and cfg.objectives[released.index(True)] is self:
            yield (
                f'objectives[{released.index(True)}]: scale = "released" is the KL times |dt| / D, and '
                f"objectives[{released.index(False)}] has no such factor, so their coefs are not comparable. "
                "Use one scale for all."
            )

    def _heard_twice(self, cfg: RunConfig) -> Iterator[str]:
        """Advice if the model of an anchor is also the teacher of some prompts. This is allowed. The model
        then counts twice on those prompts, with weight 1 + beta.
        """
        flows: list[VelocityKL] = [
            other for other in cfg.objectives if isinstance(other, VelocityKL) and other.coef
        ]
        later = flows[next((place for place, one in enumerate(flows) if one is self), len(flows)) + 1 :]
        for second in later:
            theirs = [cfg.teachers[table].sources for table in tables_of(cfg, second.teacher)]
            for table in tables_of(cfg, self.teacher):
                if cfg.teachers[table].sources in theirs:
                    yield (
                        f"teachers.{table} is the model of '{second.teacher}' too: on the prompts of this "
                        f"table the weight of that model is {self.coef:g} + {second.coef:g}."
                    )

    @property
    def requirements(self) -> Requirements:
        return Requirements(behaviour=int(self.teacher == "behaviour"))

    def __call__(self, rows: Rows[VelocityOutputs]) -> Tensor:
        student = rows.student
        square_ND = student.gap(rows.teachers[self.teacher]).square()
        if self.weight == "mse":
            return square_ND.mean(-1)
        cost_N = kl_weight(student.t_N, student.dt_N, student.noise_level_N) * square_ND.sum(-1)
        return cost_N if self.scale == "nats" else cost_N * student.dt_N.abs() / square_ND.shape[-1]
