"""The verdict on an attempt, compared with its siblings', as a shift of its advantage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.schedules import Number, at, number
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.types import Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

GRPO = Paper(
    "grpo",
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    "2402.03300",
    2024,
    "Shao, Zhihong and others",
)


@dataclass(frozen=True, config=STRICT)
class GroupAdvantage(CreditPart):
    """Shift = nats * (reward - mean reward of the group), the same at every position; no factor.

    With objective `policy_gradient` this is group-relative policy gradient; with `sampled_kl` the verdict is
    added to the teacher's word. `normalise_std` divides by the group's standard deviation plus `std_floor`
    (GRPO); the default does not, since it weighs up prompts that are nearly always solved or failed. `nats`
    is the advantage one unit of reward is worth. Attempts that ended in an error or were not judged stay out
    of the statistics and get shift 0. Neutral: nats = 0. The mean includes the attempt itself, so the
    expected gradient is (1 - 1/G) times that of the expected reward. Note `mixed`: 1 where the group's
    rewards differ, 0 where nothing can be learnt from it. arXiv 2402.03300 (GRPO), 2503.20783 (without std).
    """

    nats: Number = 1.0
    normalise_std: bool = False
    std_floor: float = 1e-6

    shifts = True
    min_group: ClassVar[int] = 2

    def __post_init__(self) -> None:
        number(self.nats, "nats")
        if not self.std_floor > 0:
            raise ValueError(f"std_floor must be positive, got {self.std_floor}")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (GRPO,)

    @property
    def requirements(self) -> Requirements:
        return Requirements(reward=True)

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        rewards = [attempt.verdict for attempt in group]
        mixed = float(len({reward for reward in rewards if reward is not None}) > 1)
        nats = at(self.nats, step_context.step)
        advantages = group_advantages(rewards, self.normalise_std, self.std_floor)
        return [
            Credit(advantage_offset_T=nats * advantage, notes={"mixed": mixed}) for advantage in advantages
        ]


def group_advantages(
    rewards: Sequence[float | None], normalise_std: bool = False, std_floor: float = 1e-6
) -> list[float]:
    """reward - mean, one per attempt, in the unit of the reward; over (unbiased std + std_floor) where
    `normalise_std`.

    None (not judged) stays outside the mean and gets 0. Equal rewards, or a single one, give exactly 0.0
    each. NaN or infinity: ValueError with the index. [] gives [].
    """
    for index, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"reward {index} of the group is {reward}; a verdict that could not be had is None"
            )
    known = [reward for reward in rewards if reward is not None]
    if len(set(known)) < 2:
        # tested before any arithmetic: a rounded mean must not leak into the advantage
        return [0.0] * len(rewards)
    mean = math.fsum(known) / len(known)
    scale = 1.0
    if normalise_std:
        scale = math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) + std_floor
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]
