"""An objective: a cost per position.

A frozen value called with `Rows` (N packed positions, what the student and each teacher say there) that
returns cost_N in nats. Position-local: row n's cost depends on row n alone. It never divides, weights or
masks: that is `loss.py`'s work, and only its. A score-function objective takes shifts: it adds
`rows.advantage_offset_N` to its advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from reflux.config.part import Part
from reflux.config.requirements import Requirements
from reflux.loss.term import LossTerm, Rows
from reflux.types import Target

if TYPE_CHECKING:
    from torch import Tensor


class ObjectivePart(Part, Protocol):
    """What an objective inherits: the defaults of what it may leave unsaid."""

    # True where the gradient is estimated from sampled positions: then `variance` says how noisily
    samples: ClassVar[bool] = False
    # what to choose where no teacher offers what it accepts
    remedy: ClassVar[str] = (
        'Use support = "teacher" where the teacher gives a list, kind = "sampled_kl" where it gives '
        "log-probs, or a local teacher"
    )

    @property
    def reverse_kl(self) -> bool:
        """True where its gradient is that of the reverse KL to its teacher, so that shifts beside it may take
        the log-ratio out again.
        """
        return False

    @property
    def setting(self) -> str:
        """The key that decides what it needs of its teacher, as it is written in a recipe; "" where none
        does.
        """
        return ""

    @property
    def group_baseline(self) -> Literal["all", "others"] | None:
        """Whose mean log-ratio its advantage is measured from: all siblings', the others' alone; None: no
        siblings'.
        """
        return None

    def outside(self, rows: Rows[Any]) -> Tensor | None:
        """True [N] at the rows where the bound of an importance ratio changes the gradient; None without a
        ratio or a bound.
        """
        return None

    def variance(self, rows: Rows[Any]) -> tuple[Tensor, Tensor] | None:
        """The exact variance of the sampled logit gradient at each row [N], with the baseline and without;
        None: nothing is sampled.
        """
        return None


class Objective(ObjectivePart, LossTerm, Protocol):
    @property
    def accepts(self) -> tuple[type[Target], ...]: ...

    @property
    def requirements(self) -> Requirements: ...
