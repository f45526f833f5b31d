"""The verifier of the task, in worker processes that can be killed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.rewards.base import RewardPart, weightless
from reflux.tasks.base import JUDGED
from reflux.types import Group, Reward

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.grading.graders import Graders
    from reflux.runtime.services import Services
    from reflux.runtime.timers import Clock
    from reflux.tasks.base import Task


@dataclass(frozen=True, config=STRICT)
class Verifier(RewardPart):
    """The result of the task's `verify(prompt, made)` for each attempt: a value, parts and feedback.

    timeout_s: the time limit of a verdict in seconds. After it the worker process is killed. workers: the
    number of worker processes. An attempt that cannot be judged (time limit, the verifier failed, sampling
    ended in an error) has Reward(None), which is different from wrong, and its `error` gives the reason.
    weight: the factor of this reward's values in the sum of several rewards.
    """

    verifies: ClassVar[bool] = True

    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    workers: Annotated[int, Field(ge=1)] = 1
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.task.judges and cfg.task.multi_turn:
            yield (
                f"{where}: the verifier takes the verdicts of the task on texts, and only the environment of "
                'this task judges. Use kind = "environment".'
            )
        elif not cfg.task.judges:
            yield (
                f'{where}: the verifier takes the verdicts of the task, and with the grader "none" nothing '
                f"is ever judged. {JUDGED}."
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return weightless(where, self.weight)

    @asynccontextmanager
    async def open(self, context: PartContext, services: Services) -> AsyncIterator[OpenVerifier]:
        """Opens the verifier with the grading workers that this process shares if they have the same
        settings, else with new ones.
        """
        from reflux.grading.graders import Graders

        shared = services.graders
        if (shared.workers, shared.timeout_s) == (self.workers, self.timeout_s):
            yield OpenVerifier(context.task, shared, services.clock)
            return
        with Graders(self.workers, self.timeout_s) as graders:
            yield OpenVerifier(context.task, graders, services.clock)


class OpenVerifier:
    """The open verifier. `score` may be called for several groups at the same time."""

    def __init__(self, task: Task, graders: Graders, clock: Clock):
        self._task, self._graders, self._clock = task, graders, clock

    async def score(self, group: Group) -> list[Reward]:
        started = time.perf_counter()
        rewards = await self._graders.judge_attempts(self._task, group)
        # If several groups wait at the same time, the waiting time of each is counted.
        self._clock.spent("rewards", "reward", started, group=group[0].rollout.prompt.key if group else None)
        return rewards
