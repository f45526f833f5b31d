"""A custom sampler: `kind = "my_lab.samplers:Mixed"`."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass as plain_dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import SamplingParams, seed_of
from reflux.samplers.references import OpenReferences, References
from reflux.types import Group, Prompt

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.reports.chart import Chart
    from reflux.reports.recorded import Recorded
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights


@dataclass(frozen=True, config=STRICT)
class Mixed(References):
    """The student's answers at a `share` of the steps, and the task's `references` at the other steps (lambda
    of GKD, arXiv 2306.13649).

    The choice is made per step and not per prompt, because parts in this process answer all prompts of a step
    in one batch and wait until all of them are requested.
    """

    share: Annotated[float, Field(ge=0, le=1)] = 0.5

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        return self._mixed(context, services)

    @asynccontextmanager
    async def _mixed(self, context: PartContext, services: Services) -> AsyncIterator[OpenMixed]:
        async with self._opened(context, services) as stored:
            yield OpenMixed(stored, self.share, context.seed)

    def diagnostics(self, name: str, recorded: Recorded) -> Iterable[Chart]:
        """The share of each step's answers that the student sampled. The log-probs of reference tokens are 0,
        because no model sampled them.
        """
        from reflux.reports.chart import step_chart

        by_step: dict[float, list[bool]] = {}
        for row in recorded.rows("attempts"):
            if row.get("kind") == "attempt":
                by_step.setdefault(float(row["step"]), []).append(any(row["logp"]))
        own = [(step, sum(written) / len(written)) for step, written in sorted(by_step.items())]
        yield step_chart(
            "Answers sampled by the student, by step", "share of attempts", {"sampled by the student": own}
        )


@plain_dataclass
class OpenMixed:
    stored: OpenReferences
    share: float
    seed: int

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        # law 8: these random numbers depend only on seed and step
        own = random.Random(seed_of(self.seed, "mixed", draw.step)).random() < self.share
        return await (self.stored.inner if own else self.stored).sample(prompt, n, draw)

    async def publish(self, weights: Weights, step: int) -> None:
        await self.stored.publish(weights, step)
