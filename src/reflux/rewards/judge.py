"""A language model as a judge without a rubric: a score for each answer, or comparisons of two."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT, PartOf
from reflux.engines.endpoints.base import Endpoint
from reflux.rewards.base import RewardPart, weightless
from reflux.rewards.chat_prompts import prompt_text
from reflux.types import TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.rewards.judge_engine import OpenJudge
    from reflux.runtime.services import Services


@dataclass(frozen=True, config=STRICT)
class JudgeReward(RewardPart):
    """The judgement of a language model that sees the question and the answers, and no reference.

    mode "score": the judge gives each answer a whole number from 0 to 10; the value is a tenth of it. mode
    "pairwise": the judge compares each two answers of the group in both orders; the value is the mean share
    of comparisons that the attempt wins against each other attempt, where "equal" counts half. Both orders
    together cancel a preference for the first place. n different answers need n calls by score and n (n - 1)
    pairwise.

    Thinking is removed before judging, and equal texts are judged once; against each other they count half.
    If a call fails or its answer cannot be used after the last try, no attempt of the group has a value.
    `parts` of mode "pairwise": `orders_differ`, the share of pairs of the group on which the orders disagree.
    """

    # scores or compares
    judge: Annotated[Endpoint, PartOf("endpoints")]
    mode: Literal["score", "pairwise"] = "score"
    # of the judge's answers
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    # of the judge's answer
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    # seconds of one try
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    # further tries after an answer that cannot be used
    repairs: Annotated[int, Field(ge=0)] = 1
    # the run stops if a larger share of a step's groups cannot be judged
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.4
    # a file with another prompt; not set: the shipped one of the mode
    prompt: str | None = None
    # the factor of this reward's values in the sum of several rewards
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @property
    def failures_allowed(self) -> float:
        return self.max_failed_share

    @property
    def paths(self) -> tuple[str, ...]:
        return ("prompt",)

    @property
    def prompt_name(self) -> Literal["score", "preference"]:
        return "score" if self.mode == "score" else "preference"

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.mode == "pairwise" and cfg.group_size < 2:
            yield f"{where} compares the attempts at one prompt, so it needs group_size >= 2, got 1."
        if cfg.task.rollouts is not TokenRollout:
            yield f"{where} judges texts, and the attempts of this task are images. Use rewards.verifier."

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return weightless(where, self.weight)

    def inputs(self, where: str) -> None:
        prompt_text(self.prompt_name, self.prompt)

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[OpenJudge]:
        from reflux.rewards.judge_engine import OpenJudge

        async with self.judge.open(context, services) as client:
            yield OpenJudge(self, client, services)
