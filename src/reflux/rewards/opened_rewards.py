"""All rewards of a run: they are opened together, judge as one, and those that learn do so once per step."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from reflux.rewards.base import LearningReward, OpenReward, RewardFn, judge, refuse_unjudged
from reflux.rewards.weighted import OpenWeighted, unchanged
from reflux.types import Group

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.step_context import StepContext
    from reflux.runtime.services import Services


@asynccontextmanager
async def open_rewards(
    rewards: Mapping[str, RewardFn], context: Callable[[str], PartContext], services: Services
) -> AsyncIterator[Rewards]:
    """Open the rewards of a recipe.

    context(name): the context of one part. The name of a reward is "rewards.NAME", so that its folder differs
    from that of a teacher called NAME.
    """
    async with AsyncExitStack() as stack:
        opened = {
            name: await stack.enter_async_context(reward.open(context(f"rewards.{name}"), services))
            for name, reward in rewards.items()
        }
        yield Rewards(rewards, opened)


class Rewards:
    """The opened rewards. parts: the same rewards in the recipe. Both by NAME of [rewards.NAME]."""

    def __init__(self, parts: Mapping[str, RewardFn], opened: Mapping[str, OpenReward]):
        self.parts = parts
        # What judges an attempt. None: there is no reward.
        self.judging = _as_one(opened, parts)
        self._learning = {
            name: cast(LearningReward, opened[name]) for name, part in parts.items() if part.learns
        }

    async def judge(self, group: Group) -> None:
        """Store a reward on each attempt of the group. Without rewards they stay without a verdict."""
        await judge(self.judging, group)

    async def learn(self, groups: Sequence[Group], step_context: StepContext) -> None:
        """Let the rewards that learn do so, one after the other in the order of the recipe. ServerError if
        more of these groups could not be judged than the rewards allow.
        """
        refuse_unjudged(groups, self.parts)
        for reward in self._learning.values():
            await reward.learn(groups, step_context)

    def save(self, folder: Path) -> None:
        """Write the state of each reward that learns into a folder of its own."""
        for name, reward in self._learning.items():
            (folder / name).mkdir()
            reward.save(folder / name)

    def load(self, folder: Path) -> None:
        for name, reward in self._learning.items():
            reward.load(folder / name)


def _as_one(opened: Mapping[str, OpenReward], parts: Mapping[str, RewardFn]) -> OpenReward | None:
    """A single reward of weight 1 is returned unchanged."""
    if unchanged(parts):
        return next(iter(opened.values()))
    return OpenWeighted(opened, {name: part.weight for name, part in parts.items()}) if opened else None
