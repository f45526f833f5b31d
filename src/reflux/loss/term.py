"""A term of the loss: what `loss` knows of an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor


Student = TypeVar("Student")


@dataclass
class Rows(Generic[Student]):
    """N packed positions of one chunk. Everything but `student` is a constant; gradients flow through
    `student` alone.

    Of texts, models say one of the three classes in `outputs.py`, and the student FullLogits; of flows,
    `loss/flow_outputs.VelocityOutputs`.
    """

    student: Student
    # by teacher name; "said" is the student as it acted
    teachers: dict[str, Any]
    # Recorded when sampled, under the distribution that was sampled from: its temperature and top-p are in
    # it.
    behaviour_logp_N: Tensor
    advantage_offset_N: Tensor
    # what a group baseline subtracts; made by batch.py before any split
    group_value_N: Tensor | None = None


class LossTerm(Protocol):
    """The members of an objective that the loss uses. `objectives.base.Objective` adds what a recipe says and
    what checks ask.
    """

    takes_advantage_offset: ClassVar[bool]

    @property
    def teacher(self) -> str | None:
        """Whose word it needs: "main", another name, "said", or None."""
        ...

    @property
    def coef(self) -> float: ...

    @property
    def group_baseline(self) -> Literal["all", "others"] | None:
        """Whose mean log-ratio its advantage is measured from: all siblings', the others' alone; None: no
        siblings'.
        """
        ...

    def outside(self, rows: Rows[Any]) -> Tensor | None:
        """True [N] at the rows where the bound of an importance ratio changes the gradient; None without a
        ratio or a bound.
        """
        ...

    def variance(self, rows: Rows[Any]) -> tuple[Tensor, Tensor] | None:
        """The exact variance of the sampled logit gradient at each row [N], with the baseline and without;
        None: nothing is sampled.
        """
        ...

    def __call__(self, rows: Rows[Any]) -> Tensor:
        """cost_N, nats."""
        ...
