"""The loop's side of a learner: what the learner returns is stored on the attempts here, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from reflux.errors import StepRefused
from reflux.learners.base import OpenLearner
from reflux.loss.step import StepRequest, StepResult
from reflux.types import Attempt, Group, StepRecord

Keep = Callable[[Sequence[Group], str], Path]


async def observe(learner: OpenLearner, groups: Sequence[Group]) -> None:
    """Store on every attempt what the student of now says along it; None where that is not wanted."""
    attempts = [attempt for group in groups for attempt in group]
    for attempt, now in zip(attempts, await learner.observe(groups), strict=True):
        attempt.now = now


async def learn(learner: OpenLearner, request: StepRequest, keep_failed_batch: Keep) -> StepResult:
    """One optimiser step, its records stored on the attempts.

    keep_failed_batch: writes the batch of a step that is not finite, and gives the file. Raises StepRefused
    with the path of that file.
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
