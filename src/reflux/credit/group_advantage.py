"""The reward of an attempt relative to the mean of its group, as an advantage offset."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from reflux.config.papers import GRPO, RLOO, Paper
from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.schedules import Number, at, number
from reflux.config.step_context import StepContext
from reflux.credit.base import CreditPart
from reflux.types import Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig


@dataclass(frozen=True, config=STRICT)
class GroupAdvantage(CreditPart):
    """Advantage offset nats * (reward - mean reward), the same at every position of an attempt.

    `baseline` "mean" takes the mean over the group, and "others" the mean over the other attempts of the
    group (leave one out, RLOO). With n judged attempts the advantages of "others" are exactly n / (n - 1)
    times those of "mean". The weight is not changed. With objective `policy_gradient` this is group-relative
    policy gradient. With `sampled_kl` the offset is added to the log-ratio of the teacher. `nats` is the
    advantage per unit of reward. `normalise_std` divides by the standard deviation of the group plus
    `std_floor` (GRPO). The default does not, because this division gives more weight to prompts that are
    nearly always solved or nearly always failed. Attempts that ended in an error or were not judged are left
    out of the statistics and get offset 0. Neutral: nats = 0. The mean of "mean" includes the attempt itself,
    so the expected gradient is (1 - 1/G) times that of the expected reward; with "others" the two are equal.
    A group whose rewards are all equal has offset 0 and still counts in the denominators of some loss
    aggregations; see `count_dead_groups` of objective `policy_gradient`. Note `mixed`: 1 if the rewards of
    the group differ, 0 if they do not, and then nothing can be learnt from the group. arXiv 2402.03300
    (GRPO), 2503.20783 (without std), 2402.14740 (RLOO).
    """

    nats: Number = 1.0
    normalise_std: bool = False
    std_floor: float = 1e-6
    # the attempts whose mean reward is subtracted: all of the group, or all but the attempt itself
    baseline: Literal["mean", "others"] = "mean"

    gives_offsets = True
    min_group = 2

    def __post_init__(self) -> None:
        number(self.nats, "nats")
        if not self.std_floor > 0:
            raise ValueError(f"std_floor must be positive, got {self.std_floor}")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (GRPO,) if self.baseline == "mean" else (RLOO,)

    @property
    def requirements(self) -> Requirements:
        return Requirements(reward=True)

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        rewards = [attempt.verdict for attempt in group]
        mixed = float(len({reward for reward in rewards if reward is not None}) > 1)
        nats = at(self.nats, step_context.step)
        advantages = group_advantages(rewards, self.normalise_std, self.std_floor, self.baseline)
        return [
            Credit(advantage_offset_T=nats * advantage, notes={"mixed": mixed}) for advantage in advantages
        ]


def group_advantages(
    rewards: Sequence[float | None],
    normalise_std: bool = False,
    std_floor: float = 1e-6,
    baseline: Literal["mean", "others"] = "mean",
) -> list[float]:
    """reward - mean for each attempt, in the unit of the reward. baseline "others": the mean is that of the
    other attempts. With `normalise_std` it is divided by (unbiased std of the group + std_floor).

    None (not judged) is left out of the mean and gets 0. Equal rewards, or a single one, give exactly 0.0
    each. NaN or infinity: ValueError with the index. [] gives [].
    """
    for index, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"reward {index} of the group is {reward}; use None for an attempt that was not judged"
            )
    known = [reward for reward in rewards if reward is not None]
    if len(set(known)) < 2:
        # Tested before any arithmetic, so that rounding of the mean cannot give a non-zero advantage.
        return [0.0] * len(rewards)
    mean, scale = math.fsum(known) / len(known), 1.0
    if normalise_std:
        scale = math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) + std_floor
    if baseline == "others":
        # r - (sum - r) / (n - 1) is n / (n - 1) times r - sum / n
        scale *= (len(known) - 1) / len(known)
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]
