"""What a learner is asked for one optimiser step, and what it gives back: values that nobody writes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reflux.metrics.values import Stats

if TYPE_CHECKING:
    from reflux.config.step_context import StepContext
    from reflux.loss.term import LossTerm
    from reflux.types import Attempt, Group, StepRecord


@dataclass(frozen=True)
class StepRequest:
    """The batch of one optimiser step, with all that its loss depends on: a learner knows no run.

    groups: targets and shares are known. loss_aggregation: what the loss divides by
    (`RunConfig.loss_aggregation`). log_variance: also compute the closed-form variance of the sampled
    gradient.
    """

    groups: Sequence[Group]
    objectives: Sequence[LossTerm]
    step_context: StepContext
    loss_aggregation: str = "token-mean-weighted"
    log_variance: bool = False

    @property
    def attempts(self) -> list[Attempt]:
        """All attempts, in the order in which results are given."""
        return [attempt for group in self.groups for attempt in group]


@dataclass(frozen=True)
class StepResult:
    """records: one per attempt of the request, in order; None for an attempt that no objective trained on.

    forward_positions, backward_positions: what the student ran, prompts included, for FLOP accounting.
    Forward counts `observe` since the step before, and twice what is computed again for the backward pass.
    """

    stats: Stats
    records: Sequence[StepRecord | None]
    forward_positions: int = 0
    backward_positions: int = 0
