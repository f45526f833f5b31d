"""The reward that came with an attempt that was made elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT, kind_of
from reflux.grading.graders import WHY_UNJUDGED
from reflux.rewards.base import RewardPart, weightless
from reflux.types import Attempt, Group, Reward

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


@dataclass(frozen=True, config=STRICT)
class RecordedReward(RewardPart):
    """The reward that came with each attempt: with the sampler `imported`, the field `reward` of its line.

    An attempt without one has no value, and `error` says so. It has none either if a tool failed or did not
    answer in time. weight: the factor of this reward's values in the sum of several rewards.
    """

    reads_recorded: ClassVar[bool] = True

    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.sampler.brings_rewards:
            yield (
                f"{where}: the attempts of sampler '{kind_of('samplers', cfg.sampler)}' come without "
                "rewards. Use kind = \"verifier\", or the sampler 'imported'."
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return weightless(where, self.weight)

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[OpenRecordedReward]:
        yield OpenRecordedReward()


class OpenRecordedReward:
    async def score(self, group: Group) -> list[Reward]:
        return [recorded(attempt) for attempt in group]


def recorded(attempt: Attempt) -> Reward:
    """The reward that the attempt came with."""
    error = WHY_UNJUDGED.get(attempt.rollout.finish)
    if error is None and attempt.reward is None:
        error = "the attempt came without a reward"
    return Reward(None, error=error) if error or attempt.reward is None else attempt.reward
