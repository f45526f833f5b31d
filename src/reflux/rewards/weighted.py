"""Combines several rewards into one: the weighted sum of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping

from reflux.rewards.base import OpenReward, RewardFn
from reflux.runtime.together import together
from reflux.types import Group, Reward


def unchanged(rewards: Mapping[str, RewardFn]) -> bool:
    """True if the only reward counts as it is."""
    return [reward.weight for reward in rewards.values()] == [1.0]


def values_by_name(rewards: Mapping[str, RewardFn], found: Reward) -> dict[str, float | None]:
    """The value of each reward, without its weight. rewards: those of the recipe. found: what the object that
    `open_rewards` gives returned for one attempt.
    """
    if unchanged(rewards):
        return dict.fromkeys(rewards, found.value)
    return {name: found.parts.get(name) for name in rewards}


class OpenWeighted:
    """Calls several rewards concurrently. The result is the weighted sum of their values (`combined`)."""

    def __init__(self, opened: Mapping[str, OpenReward], weights: Mapping[str, float]):
        self._opened, self._weights = opened, weights

    async def score(self, group: Group) -> list[Reward]:
        """The weighted sum (`combined`) for each attempt. ValueError if a reward does not return one result
        for each attempt.
        """
        found = await together(reward.score(group) for reward in self._opened.values())
        by_attempt = zip(group, *found, strict=True)
        return [
            combined(dict(zip(self._opened, rewards, strict=True)), self._weights)
            for _, *rewards in by_attempt
        ]


def combined(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Reward:
    """The weighted sum of several rewards of one attempt: value = sum_k weight_k value_k. rewards, weights:
    by name.

    parts: the value of each reward under its name, unweighted, and its parts as "name.part". feedback: all
    feedback in order, separated by newlines. If a value is missing, the value is None, and `error` is that of
    the first reward without a value, with its name. If the sum is not finite, the value is None too.
    """
    parts = {name: reward.value for name, reward in rewards.items() if reward.value is not None}
    parts |= {
        f"{name}.{part}": value for name, reward in rewards.items() for part, value in reward.parts.items()
    }
    feedback = "\n".join(reward.feedback for reward in rewards.values() if reward.feedback) or None
    for name, reward in rewards.items():
        if reward.value is None:
            return Reward(None, parts, feedback, f"rewards.{name}: {reward.error or 'no verdict was given'}")
    value = sum(weights[name] * parts[name] for name in rewards)
    if not math.isfinite(value):
        return Reward(
            None, parts, feedback, f"the weighted sum of the rewards is {value}, which is not finite"
        )
    return Reward(value, parts, feedback)
