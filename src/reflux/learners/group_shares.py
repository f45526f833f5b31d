"""Shares the groups of a batch out to ranks. A group is never cut, because its baselines need all of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from reflux.runtime.even_shares import even_shares
from reflux.types import Attempt, Group


def shares(groups: Sequence[Group], ranks: int) -> list[list[int]]:
    """For each rank the indices of its groups, ascending. The ranks have about as many positions."""
    return even_shares([sum(_positions(attempt) for attempt in group) for group in groups], ranks)


def places(groups: Sequence[Group], share: Sequence[int]) -> list[int]:
    """The index in the whole batch of each attempt of the groups of a share."""
    starts = [0, *accumulate(len(group) for group in groups)]
    return [place for index in share for place in range(starts[index], starts[index + 1])]


def _positions(attempt: Attempt) -> int:
    return attempt.rollout.prompt_length + attempt.rollout.length
