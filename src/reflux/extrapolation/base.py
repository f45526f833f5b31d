"""Extrapolation: may move the student further along its own path after an optimiser step.

`fires(completed_steps)` says when; the loop then lets in-flight attempts finish first. `after_step` may try
weights by `await score()` (a number, higher is better, on fixed prompts with random numbers of their own, see
`score`) and returns True where the student ended elsewhere than the step left it. It moves the student by the
learner's `WeightAccess`, which is None where it offers none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from reflux.config.part import Part
from reflux.metrics.flops import Spent

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.learners.access import WeightAccess
    from reflux.runtime.services import Services

NAME = "extrapolation"


@dataclass(frozen=True)
class Scoring:
    """What extrapolation wants its candidates compared by. Higher is better.

    by: "accuracy", the mean verdict, 0 for an answer that could not be judged (or weights whose answers time
    out would win); or "minus_kl", minus the reverse KL to `teacher` on the student's own answers, the mean
    over their tokens of log q(a) - log p(a) in nats, which is unbiased (that of evals.agreement).
    """

    # fixed ones, drawn once from the training prompts
    prompts: int = 50
    # answers to each
    samples: int = 1
    by: Literal["accuracy", "minus_kl"] = "accuracy"
    # of minus_kl
    teacher: str = "main"
    # of an answer; None: the sampler's max_tokens, never a cap of training
    max_tokens: int | None = None


class Score(Protocol):
    @property
    def spent(self) -> Spent:
        """What was spent on scoring since the last optimiser step."""
        ...

    async def __call__(self, rng: int = 0) -> float:
        """The learner's weights on the fixed prompts. Calls with equal `random numbers` at one step meet the
        same; another number, fresh ones.
        """
        ...


class OpenExtrapolation(Protocol):
    def start(self, access: WeightAccess | None) -> None:
        """Called once on a fresh run, before the first step: these are the start weights."""
        ...

    def fires(self, completed_steps: int) -> bool: ...

    async def after_step(self, access: WeightAccess | None, score: Score, completed_steps: int) -> bool: ...

    def save(self, folder: Path) -> None:
        """What the searches to come depend on, into an empty folder."""
        ...

    def load(self, folder: Path) -> None:
        """Take up what `save` put there; the folder is empty where the checkpoint was made without an
        extrapolation.
        """
        ...


class ExtrapolationPart(Part, Protocol):
    """What extrapolation inherits."""


class Extrapolation(ExtrapolationPart, Protocol):
    @property
    def scoring(self) -> Scoring: ...

    def open(
        self, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[OpenExtrapolation]: ...


class Never:
    """No extrapolation: nothing fires."""

    def start(self, access: WeightAccess | None) -> None: ...

    def fires(self, completed_steps: int) -> bool:
        return False

    async def after_step(self, access: WeightAccess | None, score: Score, completed_steps: int) -> bool:
        return False

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@asynccontextmanager
async def opened(
    extrapolation: Extrapolation | None, context: Callable[[str], PartContext], services: Services
) -> AsyncIterator[OpenExtrapolation]:
    """The open extrapolation of a config, or `Never`."""
    if extrapolation is None:
        yield Never()
        return
    async with extrapolation.open(context(NAME), services) as found:
        yield found
