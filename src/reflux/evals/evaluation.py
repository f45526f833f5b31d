"""The context of a measurement: the sampler, the teachers and the graders that it uses. It works without a
run.

The evaluations of the loop, `reflux eval`, `reflux difficulty` and the scoring of extrapolation all use it.
Each has its own random numbers (a purpose of its own) and the length limit of evaluations, so none of them
changes training (law 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reflux.config.step_context import Purpose, SamplingParams, StepContext
from reflux.runtime.occurrences import numbered
from reflux.runtime.together import together
from reflux.types import Attempt, Group, Prompt, Reward

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.samplers.base import OpenSampler, Sampler
    from reflux.tasks.base import Task
    from reflux.teachers.collection import Teachers


@dataclass(frozen=True)
class Evaluation:
    """A sampler with the weights to be measured, the teachers that can score, and the context with the task
    and the limits.
    """

    context: PartContext
    services: Services
    # the `[sampler]` table of the recipe, for a measurement that opens a sampler with another model
    part: Sampler
    # the open sampler, with the weights to be measured
    sampler: OpenSampler
    teachers: Teachers | None = None
    # the current optimiser step; the random numbers depend on it
    step: int = 0

    @property
    def task(self) -> Task:
        return self.context.task

    @property
    def seed(self) -> int:
        return self.context.seed

    @property
    def step_context(self) -> StepContext:
        return StepContext(self.step, self.seed, completed=self.step)

    def draw(
        self, purpose: Purpose, *, limit: int | None = None, temperature: float = 1.0, rng: int = 0
    ) -> SamplingParams:
        """The sampling parameters of answers: at most `limit` positions (without it the limit of
        evaluations), and the stop strings of training. purpose, rng: parts of the key of the random numbers.

        At temperature 0 the step is 0, so the random numbers that remain (the initial noise of an image) do
        not change with the step.
        """
        positions = limit or self.context.numbers.evaluation_positions
        return SamplingParams(
            self.step if temperature else 0,
            purpose,
            positions,
            temperature,
            stop=self.context.generation.stop,
            rng=rng,
            completed=self.step,
        )

    async def groups(
        self, prompts: Sequence[Prompt], n: int, draw: SamplingParams, sampler: OpenSampler | None = None
    ) -> list[Group]:
        """`n` answers to each prompt, in order, requested together. draw: the sampling parameters. sampler:
        used in place of `self.sampler`.
        """
        asked, acting = replace(draw, cohort=len(prompts)), sampler or self.sampler
        return await together(acting.sample(prompt, n, asked) for prompt in numbered(prompts))

    async def judged(self, attempts: Sequence[Attempt]) -> list[Reward]:
        """The rewards from the verifier of the task, in order."""
        return await self.services.graders.judge_attempts(self.task, attempts)
