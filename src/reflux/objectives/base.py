"""An objective: a cost per position.

A frozen value called with `Rows` (N packed positions, what the student and each teacher say there) that returns cost_N in nats.
Position-local: row n's cost depends on row n alone. It never divides, weights or masks: that is `loss.py`'s work, and only its. A
score-function objective takes shifts: it adds `rows.shift_N` to its advantage.

What a model says at N rows is one of three classes in `says.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from reflux.types import Target, Wants

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.objectives.says import FullSays, Says


@dataclass
class Rows:
    """N packed positions of one chunk. Everything but `student` is a constant; gradients flow through `student` alone."""

    ids_N: Tensor  # the sampled tokens
    student: FullSays
    teachers: dict[str, Says]  # by teacher name; "said" is the student as it acted
    behaviour_logp_N: Tensor  # recorded when sampled
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

    def __call__(self, rows: Rows) -> Tensor:
        """cost_N, nats."""
        ...
