"""An objective: a cost per position.

A frozen value called with `Rows` (N packed positions, what the student and each teacher say there) that returns cost_N in nats.
Position-local: row n's cost depends on row n alone. It never divides, weights or masks: that is `loss.py`'s work, and only its. A
score-function objective takes shifts: it adds `rows.shift_N` to its advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from reflux.part import Part
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


class ObjectivePart(Part, Protocol):
    """What an objective inherits: the defaults of what it may leave unsaid."""

    samples: ClassVar[bool] = False  # True where the gradient is estimated from sampled positions: then `variance` says how noisily
    remedy: ClassVar[str] = (  # what to choose where no teacher offers what it accepts
        'Use support = "teacher" where the teacher gives a list, kind = "sampled_kl" where it gives log-probs, or a local teacher'
    )

    @property
    def reverse_kl(self) -> bool:
        """True where its gradient is that of the reverse KL to its teacher, so that shifts beside it may take the log-ratio out again."""
        return False

    @property
    def setting(self) -> str:
        """The key that decides what it needs of its teacher, as it is written in a recipe; "" where none does."""
        return ""

    @property
    def group_baseline(self) -> Literal["all", "others"] | None:
        """Whose mean log-ratio its advantage is measured from: all siblings', the others' alone; None: no siblings'."""
        return None

    def outside(self, rows: Rows[Any]) -> Tensor | None:
        """True [N] at the rows where the bound of an importance ratio changes the gradient; None without a ratio or a bound."""
        return None

    def variance(self, rows: Rows[Any]) -> tuple[Tensor, Tensor] | None:
        """The exact variance of the sampled logit gradient at each row [N], with the baseline and without; None: nothing is sampled."""
        return None


class Objective(ObjectivePart, Protocol):
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
