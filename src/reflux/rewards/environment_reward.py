"""The rewards that the environment of a multi-turn task gave."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT, kind_of
from reflux.grading.graders import WHY_UNJUDGED
from reflux.rewards.base import RewardPart, weightless
from reflux.types import Group, Reward, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


@dataclass(frozen=True, config=STRICT)
class EnvironmentReward(RewardPart):
    """The sum of the rewards that the environment of the task gave to the turns of an attempt.

    An attempt has no value, and `error` gives the reason, if its environment gave no reward, if a tool failed
    or did not answer in time, or if the sum is not finite. A turn that the length limit cut is never shown to
    the environment. So an attempt that is cut in its first turn has no value, which is different from the
    value 0. weight: the factor of this reward's values in the sum of several rewards.
    """

    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.task.multi_turn:
            yield (
                f"{where}: the task '{kind_of('tasks', cfg.task)}' opens no environment, so no attempt would "
                f'have a reward. Use kind = "verifier", or a task with turns (docs/extending.md).'
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.sampler.on_policy:
            yield (
                f"{where}: sampler '{kind_of('samplers', cfg.sampler)}' gives answers that the current "
                f"student did not write. No environment receives a given answer, so these have no reward."
            )
        yield from weightless(where, self.weight)

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[OpenEnvironmentReward]:
        yield OpenEnvironmentReward()


class OpenEnvironmentReward:
    async def score(self, group: Group) -> list[Reward]:
        return [given(attempt.rollout) for attempt in group]


def given(rollout: Rollout) -> Reward:
    """The reward that the environment gave this attempt. TypeError for an image, which has no turns."""
    if not isinstance(rollout, TokenRollout):
        raise TypeError(f"an environment reward needs a text, and this is a {type(rollout).__name__}")
    value = rollout.environment_reward
    error = WHY_UNJUDGED.get(rollout.finish)
    if error is None and value is None:
        error = f'the environment gave no reward (the attempt ended with "{rollout.finish}")'
    if error is None and value is not None and not math.isfinite(value):
        error = f"the environment's reward is {value}, which is not finite"
    return Reward(None, error=error) if error else Reward(value)
