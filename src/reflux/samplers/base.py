"""A sampler: the student acts.

`open(context, services)` gives an object that holds its own copy of the weights. `sample` returns one group;
`publish` puts new weights in place after the model call in progress. What a sampled token is depends on (run
seed, purpose, step, prompt id, sample, turn, position) and `draw.random numbers` alone.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from reflux.config import registry
from reflux.config.part import Part
from reflux.config.step_context import SamplingParams
from reflux.types import Group, Prompt, Rollout

if TYPE_CHECKING:
    from reflux.config.context import Generation, PartContext
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights


class OpenSampler(Protocol):
    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group: ...

    async def publish(self, weights: Weights, step: int) -> None:
        """Sample with these from now on; `step` optimiser steps are done, also where the last one left the
        weights as they were.
        """
        ...


class SamplerPart(Part, Protocol):
    """What a sampler inherits: the defaults of what it may leave unsaid."""

    # True where teachers make the attempts, and so are at work without an objective
    asks_teachers: ClassVar[bool] = False

    @property
    def computed_share(self) -> float:
        """Positions that are computed for each position of an attempt: 2 under guidance, more where more is
        drawn than is learnt of.
        """
        return 1.0

    @property
    def overlaps(self) -> bool:
        """True where others are at work in the event loop during its model calls, which then leave the loop's
        thread.
        """
        return False

    def open_with(
        self, model: Any, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[OpenSampler]:
        """The same sampler with a teacher's model in place of the student's: the name of a model of texts, or
        a flow that is open.

        A sampler of a user's own leaves it to the default one of its kind.
        """
        default = registry.part("samplers", "hf" if isinstance(model, str) else "flow")
        return default().open_with(model, context, services)


class Sampler(SamplerPart, Protocol):
    # False where the attempts were not written by the student of now
    on_policy: ClassVar[bool]
    # what its attempts are
    rollouts: ClassVar[type[Rollout]]

    @property
    def allow_biased(self) -> bool:
        """True where a temperature or top-p other than 1 may be asked for."""
        ...

    @property
    def evaluation_positions(self) -> int:
        """The most positions an attempt may have that is not of training: a limit of its own, whatever cap
        training has.
        """
        ...

    def draw(self, step: int) -> SamplingParams:
        """How training attempts of optimiser step `step` (from 0) are sampled; the run adds how many are
        asked for together.
        """
        ...

    @property
    def exact_rng(self) -> bool:
        """True where a run at staleness 0 samples the same attempts bit for bit whenever it is repeated (laws
        7 and 8).
        """
        ...

    @property
    def generation(self) -> Generation:
        """How the student's own attempts are sampled, in training or in evaluations alone."""
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenSampler]: ...
