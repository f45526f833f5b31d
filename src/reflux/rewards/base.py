"""A reward: `open(context, services)` gives an object whose `score(group)` returns one `Reward` for each
attempt, and mutates nothing.

An attempt that could not be judged (no time left, no stored answer) gets Reward(None, error=...): not judged,
which is not wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from reflux.config.part import Part
from reflux.types import Group, Reward

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services


class OpenReward(Protocol):
    async def score(self, group: Group) -> list[Reward]:
        """One for each attempt of the group, in order."""
        ...


class RewardPart(Part, Protocol):
    """What a reward inherits."""


class RewardFn(RewardPart, Protocol):
    @property
    def weight(self) -> float:
        """What its value is multiplied by where the values of several rewards are added."""
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenReward]: ...


def weightless(where: str, weight: float) -> Iterable[str]:
    """Advice of a reward at `where` whose weight is 0."""
    if not weight:
        yield (
            f"{where}.weight = 0: this reward is asked and recorded, and its value counts nothing. An "
            "attempt that it cannot judge has no "
            f"reward all the same."
        )


def unlike_threshold(where: str, threshold: float, rewards: Mapping[str, RewardFn]) -> Iterable[str]:
    """Advice of a part that takes a reward of at least `threshold` for success, where rewards are summed or
    scaled.
    """
    weights = {name: reward.weight for name, reward in rewards.items()}
    if weights and list(weights.values()) != [1.0]:
        terms = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())
        yield f"{where}.threshold = {threshold:g} is compared with the sum {terms}. Set it to the least sum that counts as success."


async def judge(reward: OpenReward | None, group: Group) -> None:
    """Ask, and keep what comes back on the attempts. Without a reward no verdict is given: they stay without
    one.
    """
    if reward is not None:
        for attempt, found in zip(group, await reward.score(group), strict=True):
            attempt.reward = found
