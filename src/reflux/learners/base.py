"""The learner protocol: a learner trains the student.

`open(context, services)` returns an object with the training state. `step` makes one optimiser step from
groups whose targets and credits are known (`services.run_model`). If the loss weight of every position is 0,
no optimiser step is made and the version stays the same, because Adam's moments and weight decay would change
the student's weights without any evidence. A learner returns its results and does not write to attempts;
`learning.py` stores the results on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from reflux.config.part import Part
from reflux.config.schedules import Number, at, first_below
from reflux.loss.step import StepRequest, StepResult
from reflux.types import Group, Rollout, Target

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.config.context import PartContext, StudentSpec
    from reflux.learners.access import WeightAccess
    from reflux.models.text import Model
    from reflux.models.text_shape import TextShape
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights


Done = TypeVar("Done")


class OpenLearner(Protocol):
    # Version of the weights: the number of optimiser steps that changed them, plus the number of
    # extrapolation jumps, which the loop adds.
    version: int
    # The transformers model, for the preflight checks.
    model: Model

    def publish(self) -> Weights:
        """A handle on the current weights."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The student's full weights by the model's own parameter names, with adapters merged. Callers must
        not write to them.
        """
        ...

    def at_mean(self) -> AbstractContextManager[bool]:
        """Within this context the student has the average of its weights over training, if an average is
        kept. The context value is True in that case. Evaluations and exports use this context.
        """
        ...

    @property
    def access(self) -> WeightAccess | None:
        """Read and write access to the weights by name; None if the learner does not offer this access."""
        ...

    @property
    def macs(self) -> int:
        """Multiply-accumulates per position, for FLOP accounting. For a language model this is the number of
        active parameters.
        """
        ...

    def everywhere(self, work: Callable[..., Done], *arguments: Any) -> Done:
        """The result of work(learner, *arguments) in this process. If several processes share the student's
        weights, all of them run `work` at the same time, each with its own learner. Measurements that use the
        model are made in this way. work: a function that can be pickled.
        """
        ...

    async def observe(self, groups: Sequence[Group]) -> list[Target | None]:
        """The current student's outputs at each attempt's positions: one target per attempt, in order. None
        for an attempt if no part of the recipe requires these outputs, or if they cannot be computed.
        """
        ...

    async def step(self, request: StepRequest) -> StepResult:
        """Make one optimiser step. Raises StepRefused if the loss or the gradient norm is not finite; nothing
        has changed then.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write all that training has changed into an empty folder: weights, optimiser moments, counters."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        ...

    def export(self, folder: Path) -> None:
        """Write the student in Hugging Face format, with its tokenizer."""
        ...


class LearnerPart(Part, Protocol):
    """Base class of learners. It holds the defaults of optional members."""

    # True if several processes can share the student's weights. They take part by `follow`.
    divides: ClassVar[bool] = False

    @property
    def trains_all(self) -> bool:
        """False if only adapters are trained and the model's own weights stay fixed."""
        return True

    @property
    def averages(self) -> bool:
        """True if an average of the weights is kept. Evaluations and exports then use the average."""
        return False

    def follow(self) -> bool:
        """In a process that only holds a part of the student: take part in the run of the process that leads,
        until that run ends, and return True. False in every other process, at once.
        """
        return False

    def dismiss(self) -> None:
        """End the other processes' wait for a run that has nothing left to do. Called instead of `open`."""

    def activation_bytes(self, shape: TextShape, gpu: bool, tokens: int) -> int:
        """An estimate of the bytes that one micro-batch keeps for its backward pass; 0 if it is not known.
        shape: of the student. gpu: the device is a GPU. tokens: of all texts of a step.
        """
        return 0


def negative_rate(where: str, rate: Number, steps: int) -> Iterable[str]:
    """Yield an error text if the learning rate `rate` is below 0 at one of the `steps` optimiser steps.
    where: the path of its key in the recipe, for the text.
    """
    if (step := first_below(rate, 0, steps)) is not None:
        yield (
            f"{where} is {at(rate, step):g} at step {step}: it would move the student away from its teacher. "
            "Keep it at 0 or more."
        )


class Learner(LearnerPart, Protocol):
    # The type of rollouts that the learner trains on.
    rollouts: ClassVar[type[Rollout]]

    @property
    def model(self) -> str:
        """The model that training starts from: a folder, a hub id, or an earlier run directory."""
        ...

    @property
    def student(self) -> StudentSpec:
        """The student's model name and how its prompts are rendered."""
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenLearner]: ...
