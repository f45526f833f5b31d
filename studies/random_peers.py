"""The control of studies/peers.toml and peer_signal.py: as many blocks under the same headings, but whoever comes, right or wrong.

As a context: kind = "random_peers:RandomPeers", with this folder on PYTHONPATH.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.contexts.base import ContextPart, View, retold
from reflux.contexts.peers import Peers
from reflux.contexts.wording import with_attempts
from reflux.types import Group, Moment, TokenRollout, Wants


@dataclass(frozen=True, config=STRICT)
class RandomPeers(ContextPart):
    """Each attempt is shown as many others under each heading as `Peers` would show it, drawn at random without a look at their verdicts,
    itself left out. The dice depend on (run seed, prompt, policy version, sample)."""

    successes: int = 2
    failures: int = 1

    min_group: ClassVar[int] = 2

    @property
    def wants(self) -> Wants:
        return Peers(self.successes, self.failures).wants

    def __call__(self, group: Group, moment: Moment) -> list[View | None]:
        views = Peers(self.successes, self.failures, feedback="never")(group, moment)
        return [view and self._view(group, place, view, moment) for place, view in enumerate(views)]

    def _view(self, group: Group, place: int, view: View, moment: Moment) -> View:
        rollout = group[place].rollout
        dice = Moment(0, moment.seed).dice("random_peers", rollout.prompt.id, rollout.version, rollout.sample)
        texts = [attempt.rollout.text if isinstance(attempt.rollout, TokenRollout) else "" for attempt in group]
        others = [i for i, other in enumerate(group) if i != place and other.verdict is not None]
        right, wrong = int(view.notes["successes"]), int(view.notes["failures"])
        drawn = [texts[i] for i in dice.sample(others, right + wrong)]
        messages = retold(rollout.prompt.messages, lambda problem: with_attempts(problem, drawn[:right], drawn[right:]))
        return View(messages, notes={**view.notes, "twin_fraction": float(texts[place] in drawn)})
