"""An accelerator: may move the student further along its own path after an optimiser step.

`fires(completed_steps)` says when; the loop then lets in-flight attempts finish first. `after_step` may try weights by `await score()`
(a number, higher is better, on fixed prompts with dice of their own, see `score`) and returns True where the student ended elsewhere than
the step left it. It moves the student by the learner's `WeightAccess`, which is None where it offers none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from reflux.accelerators.score import Scorer, Scoring, Spent
from reflux.part import Part

if TYPE_CHECKING:
    from reflux.context import PartContext
    from reflux.learners.access import WeightAccess
    from reflux.services import Services

NAME = "accelerator"


class Score(Protocol):
    @property
    def spent(self) -> Spent:
        """What was spent on scoring since the last optimiser step."""
        ...

    async def __call__(self, dice: int = 0) -> float:
        """The learner's weights on the fixed prompts. Calls with equal `dice` at one step meet the same; another number, fresh ones."""
        ...


class OpenAccelerator(Protocol):
    def start(self, access: WeightAccess | None) -> None:
        """Called once on a fresh run, before the first step: these are the start weights."""
        ...

    def fires(self, completed_steps: int) -> bool: ...

    async def after_step(self, access: WeightAccess | None, score: Score, completed_steps: int) -> bool: ...

    def save(self, folder: Path) -> None:
        """What the searches to come depend on, into an empty folder."""
        ...

    def load(self, folder: Path) -> None:
        """Take up what `save` put there; the folder is empty where the checkpoint was made without an accelerator."""
        ...


class AcceleratorPart(Part, Protocol):
    """What an accelerator inherits."""


class Accelerator(AcceleratorPart, Protocol):
    @property
    def scoring(self) -> Scoring: ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenAccelerator]: ...


class Never:
    """No accelerator: nothing fires."""

    def start(self, access: WeightAccess | None) -> None: ...

    def fires(self, completed_steps: int) -> bool:
        return False

    async def after_step(self, access: WeightAccess | None, score: Score, completed_steps: int) -> bool:
        return False

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@asynccontextmanager
async def opened(
    accelerator: Accelerator | None, context: Callable[[str], PartContext], services: Services
) -> AsyncIterator[OpenAccelerator]:
    """The open accelerator of a config, or `Never`."""
    if accelerator is None:
        yield Never()
        return
    async with accelerator.open(context(NAME), services) as found:
        yield found


def scorer(accelerator: Accelerator | None, context: Callable[[str], PartContext], services: Services) -> Scorer | None:
    """What an accelerator compares weights by; None where there is none."""
    return Scorer(accelerator.scoring, context(NAME), services) if accelerator is not None else None
