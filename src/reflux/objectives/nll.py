"""Negative log-likelihood of recorded tokens: plain fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from reflux.objectives.base import ObjectivePart, Rows
from reflux.objectives.sampled_kl import check_coef
from reflux.parts import STRICT
from reflux.types import Target, Wants

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class NLL(ObjectivePart):
    """-log p(a) of the recorded token, nats: learns to repeat given answers (the `stored` sampler), as baseline and cold start.

    Over answers of a data distribution q its expected gradient is that of KL(q || p) at each prefix. Over the student's own attempts
    that gradient is 0: nothing is learnt. Exempt from law 2 (zero at home): its cost is the entropy there, not 0.
    """

    coef: float = 1.0

    teacher: ClassVar[None] = None
    takes_shift: ClassVar[bool] = False
    accepts: ClassVar[tuple[type[Target], ...]] = ()

    def __post_init__(self) -> None:
        check_coef(self.coef)

    @property
    def wants(self) -> Wants:
        return Wants()

    def __call__(self, rows: Rows[Any]) -> Tensor:
        return -rows.student.logp_N
