"""A custom objective: `kind = "my_lab.objectives:Jeffreys"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.loss.term import Rows
from reflux.objectives.base import ObjectivePart
from reflux.types import HiddenTarget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class Jeffreys(ObjectivePart):
    """(KL(student || teacher) + KL(teacher || student)) / 2 over the whole vocabulary, in nats. It is 0 where
    the two distributions are equal and never negative.
    """

    teacher: str = "main"
    coef: float = 1.0

    takes_advantage_offset: ClassVar[bool] = False
    accepts = (HiddenTarget,)

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, rows: Rows) -> Tensor:
        from reflux.loss.outputs import FullLogits

        student, teacher = rows.student, rows.teachers[self.teacher]
        # `accepts` ensures this
        assert isinstance(teacher, FullLogits)
        return (student.divergence(teacher, "reverse") + student.divergence(teacher, "forward")) / 2
