"""The controls of studies/prefix.toml: as many positions as a prefix has, but at random places, and a prefix
of answers that the student did not write.

Use them as credit rules: kind = "position_arms:RandomPositions", with this folder on PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext, seed_of
from reflux.credit.base import CreditPart
from reflux.credit.prefix import Prefix
from reflux.types import Attempt, Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig


@dataclass(frozen=True, config=STRICT)
class RandomPositions(CreditPart):
    """Weight 1 at `length` of the chosen positions of each attempt, drawn at random without replacement, and
    0 at the others. The positions depend on (run seed, prompt, policy version, sample). An attempt with fewer
    chosen positions keeps them all.
    """

    length: int

    gives_offsets = False
    min_group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1 position, got {self.length}")

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        return [self._credit(attempt, step_context.seed) for attempt in group]

    def _credit(self, attempt: Attempt, seed: int) -> Credit:
        rollout = attempt.rollout
        rng = np.random.default_rng(
            seed_of("random_positions", seed, rollout.prompt.id, rollout.version, rollout.sample)
        )
        chosen = np.flatnonzero(rollout.mask_T)
        weight_T = np.where(rollout.mask_T, 0.0, 1.0).astype(np.float32)
        weight_T[rng.permutation(chosen)[: self.length]] = 1.0
        return Credit(weight_T=weight_T)


@dataclass(frozen=True, config=STRICT)
class CutReferences(Prefix):
    """`Prefix` that also cuts answers which the student did not write. The shipped rule refuses this: answers
    without their end teach the student never to end. The study measures that.
    """

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return ()
