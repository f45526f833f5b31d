"""What rewards that ask a language model share: which attempts are judged, and what a failure means.

Consumes: groups, several at the same time. Waits for: the answers of servers, each with a time limit. A group
is judged as a whole or not at all, because the attempts are compared with each other.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol

from reflux.errors import ServerError
from reflux.grading.graders import WHY_UNJUDGED
from reflux.grading.thinking import after_thinking
from reflux.models.chat.surrogates import whole_characters
from reflux.types import Group, Prompt, Reward

if TYPE_CHECKING:
    from reflux.runtime.services import Services


class GroupJudge(Protocol):
    """The base class of opened rewards that judge the texts of a group together. role: by which the groups
    are counted in the usage, such as "rubric".
    """

    services: Services
    role: str

    @abstractmethod
    async def judged(self, prompt: Prompt, texts: list[str]) -> list[Reward]:
        """One reward for each text. Raises ServerError if one of them cannot be judged."""

    async def score(self, group: Group) -> list[Reward]:
        """One reward for each attempt. If the judgement fails, no attempt of the group has a value, and the
        reason is the error of each. Attempts that ended without a fault of the student are not judged.
        """
        started = time.perf_counter()
        why = [WHY_UNJUDGED.get(attempt.rollout.finish) for attempt in group]
        texts = [
            whole_characters(after_thinking(str(attempt.rollout.made)))
            for attempt, reason in zip(group, why, strict=True)
            if reason is None
        ]
        found, counts = [], {"groups": 1}
        if texts:
            try:
                found = await self.judged(group[0].rollout.prompt, texts)
            except ServerError as error:
                counts["groups_failed"] = 1
                found = [Reward(None, error=f"the group was not judged: {error}")] * len(texts)
        self.services.usage.add(self.role, counts)
        self.services.clock.add("reward", time.perf_counter() - started)
        rewards = iter(found)
        return [Reward(None, error=reason) if reason else next(rewards) for reason in why]
