"""Negative log-likelihood of recorded tokens: plain fine-tuning."""

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
    """-log p(a) of the recorded token, nats: learns to repeat given answers (the `references` sampler), as
      baseline and cold start.

    Over answers of a data distribution q its expected gradient is that of KL(q || p) at each prefix. Over the
    student's own attempts that gradient is 0: nothing is learnt. Exempt from law 2 (zero at identity): its
    cost is the entropy there, not 0.
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
                f"{where} ('nll') learns the tokens of given answers, and images have none. To learn from "
                "given images use kind = "
                '"velocity_kl" with teacher = "behaviour" and weight = "mse", and sampler.kind = '
                '"teacher_samples".'
            )

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, rows: Rows[Any]) -> Tensor:
        return -rows.student.logp_N
