"""The protocol of objectives. An objective gives a cost per position.

An objective is a frozen value. It is called with `Rows` (N packed positions with the outputs of the student
and of each teacher there) and returns cost_N in nats. The cost of row n depends on row n alone. An objective
never divides, weights or masks: only the package `loss` does. An objective that uses the score function
takes advantage offsets: it adds `rows.advantage_offset_N` to its advantage.
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
    """The base class of objectives. It holds the defaults of their optional members."""

    # True if the gradient is estimated from sampled tokens. Then `variance` gives the variance of the
    # estimate.
    samples: ClassVar[bool] = False
    # the advice in the error message if no teacher offers a target that this objective accepts
    remedy: ClassVar[str] = (
        'Use support = "teacher" where the teacher gives a list, kind = "sampled_kl" where it gives '
        "log-probs, or a local teacher"
    )

    @property
    def reverse_kl(self) -> bool:
        """True if the gradient is that of the reverse KL to the teacher. Then an advantage offset may
        subtract the log-ratio again.
        """
        return False

    @property
    def setting(self) -> str:
        """The setting of the objective that decides which targets of the teacher are needed, as it is written
        in a recipe. "" if no setting decides this.
        """
        return ""

    @property
    def group_baseline(self) -> Literal["all", "others"] | None:
        """The attempts of the group whose mean log-ratio is subtracted from the advantage: "all" of them, or
        the "others" without the attempt itself. None: no group baseline.
        """
        return None

    @property
    def skips_dead_groups(self) -> bool:
        """True if the denominator of this objective leaves out the attempts of groups in which it contributes
        to the loss of no attempt.
        """
        return False

    @property
    def listed(self) -> Requirements:
        """What the objective requires in addition where its teacher gives log-probs at listed tokens instead
        of the full distribution.
        """
        return Requirements()

    def outside(self, rows: Rows[Any]) -> Tensor | None:
        """True at the rows where the bound of the importance ratio changes the gradient, [N]. None without a
        ratio or without a bound.
        """
        return None

    def variance(self, rows: Rows[Any]) -> tuple[Tensor, Tensor] | None:
        """The exact variance of the sampled logit gradient at each row, [N], with the baseline and without.
        None if nothing is sampled.
        """
        return None


class Objective(ObjectivePart, LossTerm, Protocol):
    @property
    def accepts(self) -> tuple[type[Target], ...]: ...

    @property
    def requirements(self) -> Requirements: ...
