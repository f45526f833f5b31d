"""A reward: `open(run)` gives an object whose `score(group)` fills `attempt.reward`.

An attempt whose verdict could not be had (timeout, no stored answer) gets Reward(value=None): not judged, which is not wrong.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from reflux.part import Part
from reflux.types import Group

if TYPE_CHECKING:
    from reflux.rundir import Run


class OpenReward(Protocol):
    async def score(self, group: Group) -> None: ...


class RewardPart(Part, Protocol):
    """What a reward inherits."""


class RewardFn(RewardPart, Protocol):
    def open(self, run: Run) -> AbstractAsyncContextManager[OpenReward]: ...


class NoReward:
    """No verdict is given: rewards stay None."""

    async def score(self, group: Group) -> None: ...
