"""A credit rule: how much does each position count?

A frozen value called with a whole group, before any micro-batch or rank split, that answers with one Share
per attempt: a factor (multiplies the weight) and/or a shift (nats added to the advantage). Products and sums
commute, so the order of rules never matters. A rule is pure: what it must draw, it draws from
`moment.dice(...)`.
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
    """What a credit rule inherits: the defaults of what it may leave unsaid."""

    def diagnostics(self, name: str, recorded: Recorded) -> Iterable[Chart]:
        """What metrics.jsonl has of it, by step: its notes that are plain numbers, its mean factor, its mean
        shift where it gave one.
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
    # attempts per prompt it needs to say anything
    min_group: ClassVar[int]

    @property
    def shifts(self) -> bool:
        """True where the rule may return a shift: exactly one objective must then take it."""
        ...

    @property
    def requirements(self) -> Requirements: ...

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]: ...


def share_credit(groups: list[Group], rules: dict[str, CreditRule], step_context: StepContext) -> None:
    """Ask each rule about each group and write its word on the attempts, under the rule's name.

    Raises ValueError where a rule returns a wrong number of shares, or a factor that is negative or not
    finite.
    """
    import numpy as np

    for name, rule in rules.items():
        for group in groups:
            shares = rule(group, step_context)
            if len(shares) != len(group):
                raise ValueError(f"credit.{name} returned {len(shares)} shares for a group of {len(group)}")
            for attempt, share in zip(group, shares, strict=True):
                weight_T = np.asarray(share.weight_T)
                if not (
                    np.isfinite(weight_T).all()
                    and (weight_T >= 0).all()
                    and np.isfinite(share.advantage_offset_T).all()
                ):
                    raise ValueError(
                        f"credit.{name} gave prompt {attempt.rollout.prompt.id} a factor that is negative or "
                        "not finite, "
                        f"or a shift that is not finite"
                    )
                attempt.credits[name] = share
