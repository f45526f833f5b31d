"""Negative log-likelihood of recorded tokens: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.loss.term import Rows
from reflux.objectives.base import ObjectivePart
from reflux.objectives.sampled_kl import check_coef
from reflux.types import FlowRollout

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.config.recipe import RunConfig


@dataclass(frozen=True, config=STRICT)
class NLL(ObjectivePart):
    """-log p(a) of the recorded token, in nats. It trains the student to repeat given answers.

    With the `references` sampler it serves as a baseline and as a cold start. On answers drawn from a data
    distribution q, its expected gradient is that of KL(q || p) at each prefix. On the student's own attempts
    the expected gradient is 0, so nothing is learnt. Exempt from law 2 of the tests (cost 0 at identity,
    where student = teacher): there the expected cost is the entropy, not 0.
    """

    coef: float = 1.0

    teacher = None
    takes_advantage_offset: ClassVar[bool] = False
    accepts = ()

    def __post_init__(self) -> None:
        check_coef(self.coef)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if cfg.task.rollouts is FlowRollout:
            yield (
                f"{where} ('nll') learns the tokens of given answers, and images have no tokens. To learn "
                'from given images use kind = "velocity_kl" with teacher = "behaviour" and weight = "mse", '
                'and sampler.kind = "teacher_samples".'
            )

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, rows: Rows[Any]) -> Tensor:
        return -rows.student.logp_N
