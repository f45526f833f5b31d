"""One way to evaluate: what a measurement asks and by whom it is answered. It needs no run.

The loop's evaluations, `reflux eval`, `reflux difficulty` and extrapolation's scoring all use it; each has
its own random numbers (a purpose of its own) and the length limit of evaluations, so none of them changes
training (law 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reflux.config.step_context import Purpose, SamplingParams, StepContext
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
    """A sampler that holds the weights to be measured, the teachers that may be asked, and what the context
    says of task and limits.

    part: the sampler's table, for a measurement that opens one with another model. step: the optimiser step
    of now, on which random numbers hang.
    """

    context: PartContext
    services: Services
    part: Sampler
    sampler: OpenSampler
    teachers: Teachers | None = None
    step: int = 0

    @property
    def task(self) -> Task:
        return self.context.task

    @property
    def seed(self) -> int:
        return self.context.seed

    @property
    def step_context(self) -> StepContext:
        return StepContext(self.step, self.seed)

    def draw(
        self, purpose: Purpose, *, limit: int | None = None, temperature: float = 1.0, rng: int = 0
    ) -> SamplingParams:
        """How answers are drawn: at most `limit` positions, else as many as evaluations may have; ended where
        training's are.

        At temperature 0 the draw is that of step 0: what random numbers there are, an image's first noise, do
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
        )

    async def groups(
        self, prompts: Sequence[Prompt], n: int, draw: SamplingParams, sampler: OpenSampler | None = None
    ) -> list[Group]:
        """`n` answers to each prompt, in order, asked together; of another sampler where one is given."""
        asked, acting = replace(draw, cohort=len(prompts)), sampler or self.sampler
        return await together(acting.sample(prompt, n, asked) for prompt in prompts)

    async def judged(self, attempts: Sequence[Attempt]) -> list[Reward]:
        """The task's verdicts, in order."""
        return await self.services.graders.judge_attempts(self.task, attempts)
