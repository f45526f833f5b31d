"""The control of studies/peers.toml and peer_signal.py: the same number of blocks under the same headings,
but with attempts chosen without regard to their verdicts.

Use it as a context: kind = "random_peers:RandomPeers", with this folder on PYTHONPATH.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import ContextPart, TeacherPrompt, retold
from reflux.contexts.peers import Peers
from reflux.contexts.wording import with_attempts
from reflux.types import Group, TokenRollout


@dataclass(frozen=True, config=STRICT)
class RandomPeers(ContextPart):
    """The prompt for each attempt shows as many other attempts under each heading as `Peers` would. They are
    chosen at random from the other attempts, without regard to their verdicts. The random numbers depend on
    (run seed, prompt, policy version, sample).
    """

    successes: int = 2
    failures: int = 1

    min_group: ClassVar[int] = 2

    @property
    def requirements(self) -> Requirements:
        return Peers(self.successes, self.failures).requirements

    def __call__(self, group: Group, step_context: StepContext) -> list[TeacherPrompt | None]:
        views = Peers(self.successes, self.failures, feedback="never")(group, step_context)
        return [view and self._view(group, place, view, step_context) for place, view in enumerate(views)]

    def _view(
        self, group: Group, place: int, view: TeacherPrompt, step_context: StepContext
    ) -> TeacherPrompt:
        rollout = group[place].rollout
        rng = StepContext(0, step_context.seed).rng(
            "random_peers", rollout.prompt.id, rollout.version, rollout.sample
        )
        texts = [
            attempt.rollout.text if isinstance(attempt.rollout, TokenRollout) else "" for attempt in group
        ]
        others = [i for i, other in enumerate(group) if i != place and other.verdict is not None]
        right, wrong = int(view.notes["successes"]), int(view.notes["failures"])
        drawn = [texts[i] for i in rng.sample(others, right + wrong)]
        messages = retold(
            rollout.prompt.messages, lambda problem: with_attempts(problem, drawn[:right], drawn[right:])
        )
        return TeacherPrompt(messages, notes={**view.notes, "twin_fraction": float(texts[place] in drawn)})
