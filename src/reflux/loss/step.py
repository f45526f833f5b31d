"""The request for one optimiser step of a learner, and its result. Both are immutable."""

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
    """The batch of one optimiser step, with everything that the loss depends on. A learner does not know the
    run.

    groups: with their targets and credits. loss_aggregation: what the loss is divided by
    (`RunConfig.loss_aggregation`). log_variance: True if the closed-form variance of the sampled gradient
    is computed too.
    """

    groups: Sequence[Group]
    objectives: Sequence[LossTerm]
    step_context: StepContext
    loss_aggregation: str = "token-mean-weighted"
    log_variance: bool = False

    @property
    def attempts(self) -> list[Attempt]:
        """All attempts, in the order of the records of the result."""
        return [attempt for group in self.groups for attempt in group]


@dataclass(frozen=True)
class StepResult:
    """records: one per attempt of the request, in order; None for an attempt to which no objective
    contributed.

    forward_positions, backward_positions: the numbers of positions in the student's forward and backward
    passes, prompts included, for FLOP accounting. `forward_positions` also counts the positions of `observe`
    since the last step, and counts twice what is recomputed for the backward pass.
    """

    stats: Stats
    records: Sequence[StepRecord | None]
    forward_positions: int = 0
    backward_positions: int = 0
