"""A learner: the student moves.

`open(context, services)` gives an object with the training state. `step` turns groups whose targets and
shares are known into one optimiser step (`services.run_model`). Where every weight is 0 there is no optimiser
step (moments and decay would move weights on no evidence): the version stays. A learner returns what it found
out and writes to no attempt; `learning.py` stores it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from reflux.config.part import Part
from reflux.config.schedules import Number, at, first_below
from reflux.loss.step import StepRequest, StepResult
from reflux.types import Group, Rollout, Target

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.config.context import PartContext, StudentSpec
    from reflux.learners.access import WeightAccess
    from reflux.models.text import Model
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights


class OpenLearner(Protocol):
    # of the weights: optimiser steps that moved them, and jumps, which the loop counts
    version: int
    # transformers' view of it, for preflight
    model: Model

    def publish(self) -> Weights:
        """A handle on the weights of now."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The student's full weights by the model's own parameter names, adapters merged; not to be written
        to.
        """
        ...

    def at_mean(self) -> AbstractContextManager[bool]:
        """Within, the student has its weights averaged over training, where an average is kept (True): what
        is evaluated and exported.
        """
        ...

    @property
    def access(self) -> WeightAccess | None:
        """Its weights by name, to read and to move; None for a learner that does not offer them."""
        ...

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one position, for FLOP accounting: of a language model, its active
        parameters.
        """
        ...

    async def observe(self, groups: Sequence[Group]) -> list[Target | None]:
        """What the student of now says along each attempt, one per attempt, in order; None where nothing is
        wanted or known.
        """
        ...

    async def step(self, request: StepRequest) -> StepResult:
        """Raises StepRefused, with nothing changed, where loss or gradient norm is not finite."""
        ...

    def save(self, folder: Path) -> None:
        """All that training has made, into an empty folder: weights, moments, counters."""
        ...

    def load(self, folder: Path) -> None:
        """Take up what `save` put there."""
        ...

    def export(self, folder: Path) -> None:
        """The student in Hugging Face format, tokenizer included."""
        ...


class LearnerPart(Part, Protocol):
    """What a learner inherits: the defaults of what it may leave unsaid."""

    @property
    def trains_all(self) -> bool:
        """False where adapters are trained, and the model's own weights stay."""
        return True

    @property
    def averages(self) -> bool:
        """True where an average of the weights is kept, and that is what is evaluated and exported."""
        return False


def negative_rate(where: str, rate: Number, steps: int) -> Iterable[str]:
    """The refusal of a learning rate that is below 0 at one of so many steps."""
    if (step := first_below(rate, 0, steps)) is not None:
        yield f"{where} is {at(rate, step):g} at step {step}: it would move the student away from its teacher. Keep it at 0 or more."


class Learner(LearnerPart, Protocol):
    # what it learns from
    rollouts: ClassVar[type[Rollout]]

    @property
    def model(self) -> str:
        """What the student begins as: a folder, a hub id, an earlier run directory."""
        ...

    @property
    def student(self) -> StudentSpec:
        """The student by name, and how it is spoken to."""
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenLearner]: ...
