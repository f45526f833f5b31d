"""A term of the loss: the interface of an objective that `loss` uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor


Student = TypeVar("Student")


@dataclass
class Rows(Generic[Student]):
    """N packed positions of one chunk. Everything but `student` is a constant; gradients flow only through
    `student`.

    For texts, the outputs of a teacher are one of the three classes in `outputs.py`, and those of the
    student are FullLogits. For flows, both are `loss/flow_outputs.VelocityOutputs`.
    """

    student: Student
    # outputs by teacher name; "behaviour" is the policy that sampled
    teachers: dict[str, Any]
    # log-probs of the choices, nats, recorded at sampling, under the distribution that was sampled from:
    # its temperature and top-p are included
    behaviour_logp_N: Tensor
    # added to the advantage by the one objective that receives offsets, nats
    advantage_offset_N: Tensor
    # the value that a group baseline subtracts, nats; computed by batch.py before the batch is cut
    group_value_N: Tensor | None = None


class LossTerm(Protocol):
    """The members of an objective that the loss uses. `objectives.base.Objective` adds the members that
    recipes and checks use.
    """

    takes_advantage_offset: ClassVar[bool]

    @property
    def teacher(self) -> str | None:
        """The teacher whose outputs the objective needs: "main", another name, "behaviour", or None."""
        ...

    @property
    def coef(self) -> float: ...

    @property
    def group_baseline(self) -> Literal["all", "others"] | None:
        """The attempts of the group whose mean log-ratio is subtracted from the advantage: "all" of them, or
        the "others" without the attempt itself. None: no group baseline.
        """
        ...

    @property
    def skips_dead_groups(self) -> bool:
        """True if the denominator of this objective leaves out the attempts of groups in which it contributes
        to the loss of no attempt.
        """
        ...

    def outside(self, rows: Rows[Any]) -> Tensor | None:
        """True [N] at the rows where the bound of an importance ratio changes the gradient; None without a
        ratio or without a bound.
        """
        ...

    def variance(self, rows: Rows[Any]) -> tuple[Tensor, Tensor] | None:
        """The exact variance of the sampled logit gradient at each row [N], with the baseline and without
        it; None where the objective does not sample.
        """
        ...

    def __call__(self, rows: Rows[Any]) -> Tensor:
        """cost_N, nats."""
        ...
