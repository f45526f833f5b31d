"""An objective: a cost per position.

A frozen value called with `Rows` (N packed positions, what the student and each teacher say there) that returns cost_N in nats.
Position-local: row n's cost depends on row n alone. It never divides, weights or masks: that is `loss.py`'s work, and only its. A
score-function objective takes shifts: it adds `rows.shift_N` to its advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from reflux.types import Target, Wants

if TYPE_CHECKING:
    from torch import Tensor


Student = TypeVar("Student")


@dataclass
class Rows(Generic[Student]):
    """N packed positions of one chunk. Everything but `student` is a constant; gradients flow through `student` alone.

    Of texts, models say one of the three classes in `says.py`, and the student FullSays; of flows, `flow_says.VelocitySays`.
    """

    student: Student
    teachers: dict[str, Any]  # by teacher name; "said" is the student as it acted
    # Recorded when sampled, under the distribution that was sampled from: its temperature and top-p are in it.
    behaviour_logp_N: Tensor
    shift_N: Tensor
    group_value_N: Tensor | None = None  # what a group baseline subtracts; made by batch.py before any split


class Objective(Protocol):
    takes_shift: ClassVar[bool]

    @property
    def teacher(self) -> str | None:
        """Whose word it needs: "main", another name, "said", or None."""
        ...

    @property
    def coef(self) -> float: ...

    @property
    def accepts(self) -> tuple[type[Target], ...]: ...

    @property
    def wants(self) -> Wants: ...

    def __call__(self, rows: Rows[Any]) -> Tensor:
        """cost_N, nats."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """An objective that weighs by an importance ratio with a bound. One without `outside` is not asked."""

    def outside(self, rows: Rows[Any]) -> Tensor | None:
        """True [N] at the rows where the bound changes the gradient; None where this setting has no bound."""
        ...
