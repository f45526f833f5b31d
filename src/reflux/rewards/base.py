"""The protocol of rewards. `open(context, services)` gives an object whose `score(group)` returns one
`Reward` for each attempt and changes nothing. A reward that learns has more methods (`LearningReward`).

An attempt that cannot be judged (time limit, no stored answer) gets Reward(None, error=...). This means "not
judged", not "wrong".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from reflux.config.part import Part
from reflux.errors import ServerError
from reflux.types import UNJUDGED, Group, Reward

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.step_context import StepContext
    from reflux.runtime.services import Services


class OpenReward(Protocol):
    async def score(self, group: Group) -> list[Reward]:
        """One reward for each attempt of the group, in order."""
        ...


class LearningReward(OpenReward, Protocol):
    """An opened reward with a model of its own that learns during the run. `score` uses the model as it is at
    that moment.
    """

    async def learn(self, groups: Sequence[Group], step_context: StepContext) -> None:
        """Learn from the groups of an optimiser step, before the student does. Called once per step, at the
        same time as `score` of later attempts if max_staleness > 0.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write all that `learn` has changed into an empty folder."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        ...


class RewardPart(Part, Protocol):
    """The base class of rewards, with the defaults of optional members."""

    @property
    def failures_allowed(self) -> float:
        """The run stops if no attempt has a value in a larger share of the groups of a step."""
        return 1.0

    @property
    def references_needed(self) -> int:
        """The number of `references` that every prompt must have."""
        return 0

    # True if the reward is the one that the sampler gave with the attempt
    reads_recorded: ClassVar[bool] = False
    # True if the opened reward is a `LearningReward`
    learns: ClassVar[bool] = False


class RewardFn(RewardPart, Protocol):
    @property
    def weight(self) -> float:
        """The factor of this reward's value in the sum of several rewards."""
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenReward]: ...


def weightless(where: str, weight: float) -> Iterable[str]:
    """Advice if the weight of a reward is 0. where: the path of its table in the recipe, for the text."""
    if not weight:
        yield (
            f"{where}.weight = 0: this reward is computed and recorded, but its value does not count. An "
            f"attempt that it cannot judge still has no reward."
        )


def unlike_threshold(where: str, threshold: float, rewards: Mapping[str, RewardFn]) -> Iterable[str]:
    """Advice if rewards are summed or scaled, for a part that counts a reward of at least `threshold` as
    success. where: the path of the part's table in the recipe, for the text.
    """
    weights = {name: reward.weight for name, reward in rewards.items()}
    if weights and list(weights.values()) != [1.0]:
        terms = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())
        yield (
            f"{where}.threshold = {threshold:g} is compared with the sum {terms}. Set it to the least sum "
            "that counts as success."
        )


def refuse_unjudged(groups: Sequence[Group], rewards: Mapping[str, RewardFn]) -> None:
    """ServerError, with the reasons, if more of a step's groups have no value than the rewards allow. An
    attempt that ended without a fault of the student does not count.
    """
    if not rewards:
        return
    allowed = min(reward.failures_allowed for reward in rewards.values())
    reasons: Counter[str] = Counter()
    for group in groups:
        judged = [attempt for attempt in group if attempt.rollout.finish not in UNJUDGED]
        if judged and all(attempt.verdict is None for attempt in judged):
            found = judged[0].reward
            reasons[(found and found.error) or "no verdict was given"] += 1
    if reasons.total() > allowed * len(groups):
        listed = "\n".join(f"  {count} x {reason}" for reason, count in reasons.most_common())
        raise ServerError(
            f"{reasons.total()} of the {len(groups)} groups of this step could not be judged, and "
            f"max_failed_share allows {allowed:g} of them. The reasons:\n{listed}"
        )


async def judge(reward: OpenReward | None, group: Group) -> None:
    """Judge the attempts of a group with `reward` and store the results on the attempts. If `reward` is None,
    the attempts stay without a verdict.
    """
    if reward is not None:
        for attempt, found in zip(group, await reward.score(group), strict=True):
            attempt.reward = found
