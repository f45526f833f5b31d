"""Calls the learner for the loop and stores its results on the attempts. No other module stores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from reflux.errors import StepRefused
from reflux.learners.base import OpenLearner
from reflux.loss.step import StepRequest, StepResult
from reflux.types import Attempt, Group, StepRecord

Keep = Callable[[Sequence[Group], str], Path]


async def observe(learner: OpenLearner, groups: Sequence[Group]) -> None:
    """Store the current student's outputs on every attempt; None where no part requires them."""
    attempts = [attempt for group in groups for attempt in group]
    for attempt, now in zip(attempts, await learner.observe(groups), strict=True):
        attempt.now = now


async def learn(learner: OpenLearner, request: StepRequest, keep_failed_batch: Keep) -> StepResult:
    """Make one optimiser step and store its records on the attempts.

    keep_failed_batch: a function that writes the batch of a refused step and returns the path of the file. If
    the loss or the gradient norm is not finite, StepRefused is raised with that path.
    """
    try:
        result = await learner.step(request)
    except StepRefused as refused:
        _store(request.attempts, refused.records)
        path = keep_failed_batch(request.groups, refused.why)
        raise StepRefused(f"{refused} The batch is in {path}.", refused.why, refused.records) from refused
    _store(request.attempts, result.records)
    return result


def _store(attempts: Sequence[Attempt], records: Sequence[StepRecord | None]) -> None:
    for attempt, record in zip(attempts, records, strict=True):
        attempt.learned = record
