"""The protocol of extrapolation, which may move the student's weights further along their latest displacement
after an optimiser step.

`fires(completed_steps)` is True if extrapolation is due; the loop then lets in-flight attempts finish first.
`after_step` may test weights with `await score()` (a number, higher is better, on fixed prompts with their
own random numbers, see `score`). `after_step` returns True if the final weights differ from those after the
optimiser step. It changes the weights through the learner's `WeightAccess`, which is None if the learner
offers none.
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
    """How extrapolation scores its candidates. Higher is better.

    by: "accuracy" is the mean verdict. An answer that could not be judged counts as 0; otherwise weights
    whose answers time out would win. "minus_kl" is minus the reverse KL to `teacher` on the student's own
    answers: the mean over their tokens of log q(a) - log p(a) in nats, which is unbiased (the same estimate
    as in evals.agreement).
    """

    # Number of fixed prompts, drawn once from the training prompts.
    prompts: int = 50
    # Answers to each prompt.
    samples: int = 1
    # The quantity that is compared.
    by: Literal["accuracy", "minus_kl"] = "accuracy"
    # The teacher of "minus_kl".
    teacher: str = "main"
    # Limit of an answer in tokens; None: the sampler's max_tokens, never the cap of training.
    max_tokens: int | None = None


class Score(Protocol):
    @property
    def spent(self) -> Spent:
        """The cost of scoring since the last optimiser step."""
        ...

    async def __call__(self, rng: int = 0) -> float:
        """Score the learner's current weights on the fixed prompts. Calls with equal `rng` at one step use
        the same random numbers; another `rng` gives new ones.
        """
        ...


class OpenExtrapolation(Protocol):
    def start(self, access: WeightAccess | None) -> None:
        """Called once in a new run, before the first step. access: reads and writes the start weights."""
        ...

    def fires(self, completed_steps: int) -> bool: ...

    async def after_step(self, access: WeightAccess | None, score: Score, completed_steps: int) -> bool: ...

    def save(self, folder: Path) -> None:
        """Write the state that later searches depend on into an empty folder."""
        ...

    def load(self, folder: Path) -> None:
        """Restore the state that `save` wrote. The folder is empty if the checkpoint was made without
        extrapolation.
        """
        ...


class ExtrapolationPart(Part, Protocol):
    """Base class of extrapolation parts."""


class Extrapolation(ExtrapolationPart, Protocol):
    @property
    def scoring(self) -> Scoring: ...

    def open(
        self, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[OpenExtrapolation]: ...


class Never:
    """Used by runs without extrapolation: it never moves the weights."""

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
    """The open extrapolation of a config; `Never` if the config has none."""
    if extrapolation is None:
        yield Never()
        return
    async with extrapolation.open(context(NAME), services) as found:
        yield found
