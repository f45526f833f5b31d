"""A rubric for each group: the reward of a teacher whose answers can be read and not scored (ROPD)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, PartOf
from reflux.engines.endpoints.base import Endpoint
from reflux.rewards.base import RewardPart, weightless
from reflux.rewards.chat_prompts import prompt_text
from reflux.rewards.rubric_forms import (
    Criterion,
    Rubric,
    RubricError,
    parse_rubric,
    parse_verdicts,
    weighted_score,
)
from reflux.types import TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.rewards.rubric_engine import OpenRubric
    from reflux.runtime.services import Services

__all__ = [
    "Criterion",
    "Rubric",
    "RubricError",
    "RubricReward",
    "parse_rubric",
    "parse_verdicts",
    "weighted_score",
]

ROPD = Paper("ropd", "Rubric-based On-policy Distillation", "2605.07396", 2026)
Count = Annotated[int, Field(ge=1)]
Retries = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class RubricReward(RewardPart):
    """The weighted share of a rubric's criteria that an attempt meets, s_i = sum_k points_k verdict_ik /
    sum_k points_k, in [0, 1]. arXiv 2605.07396.

    One call of the judge writes one rubric for the whole group, from the question, the teacher's answers and
    the attempts. With rubric_per "attempt" it writes one for each attempt instead, from that attempt and the
    teacher's answers. Another call judges all these answers, the teacher's included, by that rubric: it sees
    them in an order that depends on their text alone, and not who wrote them. The score is computed from the
    verdicts; the sum that the judge adds up is only compared with it. Thinking is removed before judging, and
    equal texts are judged once.

    If a call fails or its answer cannot be used after the last try, no attempt of the group has a value.
    `parts`: each verdict by the id of its criterion, and `references`, the mean score of the teacher's
    answers. `feedback`: the criteria with the verdicts. The released code gives the judge's own sum as the
    reward, and 0 to a group that could not be judged.
    """

    # writes the rubrics and gives the verdicts
    judge: Annotated[Endpoint, PartOf("endpoints")]
    # answers each prompt during the run; not set: the `references` of the prompts are the teacher's answers
    teacher: Annotated[Endpoint | None, PartOf("endpoints")] = None
    # teacher's answers to each prompt
    references: Count = 4
    # of the teacher's answers
    teacher_temperature: Temperature = 1.0
    # of an answer of the teacher; a cut one is not accepted
    teacher_max_tokens: Count = 8192
    # seconds of one try
    teacher_timeout_s: Seconds = 120.0
    # of the rubrics
    rubric_temperature: Temperature = 0.7
    # of a rubric
    rubric_max_tokens: Count = 8192
    # seconds of one try
    rubric_timeout_s: Seconds = 120.0
    # further tries after a rubric that cannot be used
    rubric_repairs: Retries = 2
    # of the verdicts
    verdicts_temperature: Temperature = 0.0
    # of the verdicts of one call
    verdicts_max_tokens: Count = 4096
    # seconds of one try
    verdicts_timeout_s: Seconds = 60.0
    # further tries after verdicts that cannot be used
    verdicts_repairs: Retries = 1
    # the most answers that one call judges; 0: all at once
    verifier_chunk: Retries = 0
    # "attempt": a rubric for each attempt, whose scores are then on different scales; a control
    rubric_per: Literal["group", "attempt"] = "group"
    # False: the judge sees which answers are the teacher's
    blind: bool = True
    # the run stops if a larger share of a step's groups cannot be judged
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.4
    # files with other prompts; not set: the shipped ones
    rubric_prompt: str | None = None
    # see `rubric_prompt`
    verdicts_prompt: str | None = None
    # the factor of this reward's values in the sum of several rewards
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @property
    def failures_allowed(self) -> float:
        return self.max_failed_share

    @property
    def paths(self) -> tuple[str, ...]:
        return ("rubric_prompt", "verdicts_prompt")

    @property
    def references_needed(self) -> int:
        return 0 if self.teacher is not None else self.references

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if cfg.group_size < 2:
            yield f"{where} compares the attempts at one prompt, so it needs group_size >= 2, got 1."
        if cfg.task.rollouts is not TokenRollout:
            yield f"{where} judges texts, and the attempts of this task are images. Use rewards.verifier."

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.references == 1:
            yield (
                f"{where}.references = 1: the rubric is written from one answer of the teacher, which may be "
                "wrong. The paper's accuracy is far lower than with 4."
            )
        if not self.blind:
            yield f"{where}.blind = false: the judge sees which answers are the teacher's."
        yield from weightless(where, self.weight)

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (ROPD,)

    def inputs(self, where: str) -> None:
        prompt_text("rubric", self.rubric_prompt)
        prompt_text("verdicts", self.verdicts_prompt)

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[OpenRubric]:
        from reflux.rewards.rubric_engine import OpenRubric

        async with AsyncExitStack() as stack:
            judge = await stack.enter_async_context(self.judge.open(context, services))
            teacher = None
            if self.teacher is not None:
                teacher = await stack.enter_async_context(self.teacher.open(context, services))
            yield OpenRubric(self, judge, teacher, services)
