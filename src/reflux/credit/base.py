"""The protocol of credit rules. A credit rule decides how much each position counts.

A credit rule is a frozen value. It is called with a whole group, before any split into micro-batches or
ranks. It returns one `Credit` per attempt: `weight_T` multiplies the weight of a position, and
`advantage_offset_T` is added to the advantage, in nats. Products and sums commute, so the order of the rules
never matters. A rule is pure: its random numbers come from `step_context.rng(...)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Protocol

from reflux.config.part import Part
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.types import Credit, Group

if TYPE_CHECKING:
    from reflux.reports.chart import Chart
    from reflux.reports.recorded import Recorded


class CreditPart(Part, Protocol):
    """The base class of credit rules. It holds the defaults of their optional members."""

    # True if the notes hold `freshness` and `aligned`, which the table [refresh] reads
    measures_freshness: ClassVar[bool] = False

    def diagnostics(self, name: str, recorded: Recorded) -> Iterable[Chart]:
        """A chart of the values of this rule in metrics.jsonl (read through `recorded`), by step: its notes
        that are plain numbers, its mean weight, and its mean advantage offset if that is ever non-zero.
        """
        from reflux.reports.chart import step_chart

        found = recorded.metrics("credit", name)
        notes = {
            key: points
            for key, points in found.items()
            if key != "advantage_offset_mean" or any(shift for _, shift in points)
        }
        if notes:
            yield step_chart(f"credit.{name}: its notes by step", "mean over attempts", notes)


class CreditRule(CreditPart, Protocol):
    @property
    def min_group(self) -> int:
        """The smallest group size with which the rule can have an effect."""
        ...

    @property
    def gives_offsets(self) -> bool:
        """True if the rule may return an advantage offset. Then exactly one objective must take it."""
        ...

    @property
    def requirements(self) -> Requirements: ...

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]: ...


def share_credit(groups: list[Group], rules: dict[str, CreditRule], step_context: StepContext) -> None:
    """Call each rule with each group and store the rule's credits on the attempts, under the rule's name in
    `rules`.

    Raises ValueError if a rule returns a wrong number of credits, a weight that is negative or not finite, or
    an advantage offset that is not finite.
    """
    import numpy as np

    for name, rule in rules.items():
        for group in groups:
            shares = rule(group, step_context)
            if len(shares) != len(group):
                raise ValueError(f"credit.{name} returned {len(shares)} credits for a group of {len(group)}")
            for attempt, share in zip(group, shares, strict=True):
                weight_T = np.asarray(share.weight_T)
                if not (
                    np.isfinite(weight_T).all()
                    and (weight_T >= 0).all()
                    and np.isfinite(share.advantage_offset_T).all()
                ):
                    raise ValueError(
                        f"credit.{name} gave prompt {attempt.rollout.prompt.id} a weight that is negative or "
                        f"not finite, or an advantage offset that is not finite"
                    )
                attempt.credits[name] = share
