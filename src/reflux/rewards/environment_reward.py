"""What the environment of a task with turns gave its attempts."""

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
    """The sum of the rewards that a task's environment gave the turns of an attempt.

    An attempt has no value, and `error` says why, where its environment gave nothing, where a tool failed or
    did not answer in time, and where the sum is no finite number. A turn that the length limit cut is never
    shown to the environment, so an attempt cut in its first turn has no value: that is not a value of 0.
    weight: what its values are multiplied by where several rewards are added.
    """

    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.task.multi_turn:
            yield (
                f"{where}: the task '{kind_of('tasks', cfg.task)}' opens no environment, so nothing would "
                "have a reward. Use kind = "
                f'"verifier", or a task with turns (docs/extending.md).'
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.sampler.on_policy:
            yield (
                f"{where}: sampler '{kind_of('samplers', cfg.sampler)}' gives answers that the student of "
                "now did not write, and no "
                f"environment sees a given answer: those have no reward."
            )
        yield from weightless(where, self.weight)

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[OpenEnvironmentReward]:
        yield OpenEnvironmentReward()


class OpenEnvironmentReward:
    async def score(self, group: Group) -> list[Reward]:
        return [given(attempt.rollout) for attempt in group]


def given(rollout: Rollout) -> Reward:
    """What the environment of this attempt gave it. TypeError for an image, which has no turns."""
    if not isinstance(rollout, TokenRollout):
        raise TypeError(f"an environment answers to texts, and this is a {type(rollout).__name__}")
    value = rollout.environment_reward
    error = WHY_UNJUDGED.get(rollout.finish)
    if error is None and value is None:
        error = f'the environment gave no reward (the attempt ended with "{rollout.finish}")'
    if error is None and value is not None and not math.isfinite(value):
        error = f"the environment's reward is {value}, which is no number"
    return Reward(None, error=error) if error else Reward(value)
