"""The sampler protocol: a sampler samples attempts with the student.

`open(context, services)` returns an object that holds its own copy of the student's weights. `sample` returns
the group of one prompt. `publish` replaces the weights after the model call in progress. A sampled token
depends only on the weights, on (run seed, purpose, step, prompt id, sample, turn, position) and on
`draw.rng`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from reflux.config import registry
from reflux.config.context import StudentSpec
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
        """Use these weights from now on. `step` is the number of completed optimiser steps, including steps
        that left the weights unchanged.
        """
        ...


class SamplerPart(Part, Protocol):
    """Base class of samplers. It holds the defaults of optional members."""

    # True if the teachers make the attempts. The teachers are then needed even if no objective uses them.
    asks_teachers: ClassVar[bool] = False
    # True if every training prompt must have `references`
    reads_references: ClassVar[bool] = False
    # True if training attempts that the current student did not sample have the log-probs with which they
    # were sampled. Objectives then correct for the other policy by a ratio.
    recorded_logp: ClassVar[bool] = False
    # True if attempts may come with a reward, for the reward `recorded`
    brings_rewards: ClassVar[bool] = False

    @property
    def precision(self) -> str:
        """The data type that the sampler computes in; "auto": that of the model's files."""
        return "auto"

    @property
    def computed_share(self) -> float:
        """Positions computed per position of an attempt. It is 2 with guidance, and larger if the sampler
        computes more positions than are trained on.
        """
        return 1.0

    @property
    def skips_long_prompts(self) -> bool:
        """True if prompts that leave no room for an answer are left out; False if they are refused."""
        return False

    @property
    def cache_tokens(self) -> int:
        """The most tokens that a key-value cache of the sampler holds; 0 without such a cache."""
        return 0

    @property
    def server_memory(self) -> str:
        """The memory that a server of this sampler takes on this machine, in words; "" without one."""
        return ""

    def training_prompts(self, cfg: Any, start: int) -> Iterator[Prompt]:
        """The endless stream of training prompts from position `start` on: those of the task, unless the
        sampler has attempts at other ones. cfg: the whole `RunConfig`.
        """
        return cfg.task.prompts("train", cfg.seed, start)

    def check_stored(self, cfg: Any) -> None:
        """Check the attempts that the sampler reads from files, without loading weights. DataError, with the
        file and the line, if the run cannot train on one of them. cfg: the whole `RunConfig`.
        """

    def decoding(self, opened: Any) -> tuple[bool, str] | None:
        """How the model decodes, and before it True if a GPU waits for the host at each operation; None where
        there is nothing to tell. opened: what `open` of this sampler gave.
        """
        return None

    @property
    def overlaps(self) -> bool:
        """True if other tasks run in the event loop during its model calls. The model calls then run outside
        the loop's thread.
        """
        return False

    @property
    def one_process_because(self) -> str:
        """Why several processes cannot each open this sampler, as a clause; "" where they can."""
        return ""

    def open_with(
        self, model: Any, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[OpenSampler]:
        """The same sampler with a teacher's model in place of the student's. `model` is the StudentSpec of a
        text model, or an open flow model.

        The default implementation uses the built-in sampler of the model's kind, so a custom sampler need not
        implement it.
        """
        default = registry.part("samplers", "hf" if isinstance(model, StudentSpec) else "flow")
        return default().open_with(model, context, services)


class Sampler(SamplerPart, Protocol):
    # False if the training attempts were not sampled from the current student.
    on_policy: ClassVar[bool]
    # The type of the rollouts that the sampler returns.
    rollouts: ClassVar[type[Rollout]]

    @property
    def allow_biased(self) -> bool:
        """True if a temperature or top-p other than 1 is allowed."""
        ...

    @property
    def evaluation_positions(self) -> int:
        """The largest number of positions of an attempt that is not for training. It does not depend on the
        cap for training.
        """
        ...

    def draw(self, step: int) -> SamplingParams:
        """How training attempts of optimiser step `step` (from 0) are sampled. The run adds `cohort`, the
        number of groups that are requested together.
        """
        ...

    @property
    def exact_rng(self) -> bool:
        """True if repeated runs at staleness 0 sample the same attempts bit for bit (laws 7 and 8)."""
        ...

    @property
    def generation(self) -> Generation:
        """How the student's own attempts are sampled, in training or only in evaluations."""
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenSampler]: ...
