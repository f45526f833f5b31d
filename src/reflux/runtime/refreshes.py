"""Decides after each step whether the attempts in flight are discarded and sampled again ([refresh])."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

from reflux.config.refresh import Refresh
from reflux.types import Group

# keys of the run's totals: the number of refreshes, and the step after which the last one was made
COUNT, LAST = "refreshes", "refreshed_at"


class Refreshes:
    """cfg: the table [refresh]; None: never. totals: the run's totals, which checkpoints keep. rules: the
    names of the credit rules that measure freshness.
    """

    def __init__(self, cfg: Refresh | None, totals: MutableMapping[str, float], rules: Sequence[str]):
        self._cfg, self._totals, self._rules = cfg, totals, rules
        if cfg is not None:
            totals.setdefault(COUNT, 0)

    def due(self, groups: Sequence[Group], step: int) -> bool:
        """True if the batch of optimiser step `step` (from 0) was stale and the last refresh is at least
        `every` steps ago. A refresh is then counted. At most ceil(steps / every) are made in a run.
        """
        if self._cfg is None or step - self._totals.get(LAST, step - self._cfg.every) < self._cfg.every:
            return False
        if not self._stale(self._cfg, groups):
            return False
        self._totals[LAST] = step
        self._totals[COUNT] += 1
        return True

    def _stale(self, cfg: Refresh, groups: Sequence[Group]) -> bool:
        if cfg.below is None:
            return True
        # An attempt without notes has no chosen positions.
        notes = [
            attempt.credits[rule].notes
            for group in groups
            for attempt in group
            for rule in self._rules
            if "freshness" in attempt.credits[rule].notes
        ]
        if not notes:
            return False
        fresh, aligned = (sum(note[name] for note in notes) / len(notes) for name in ("freshness", "aligned"))
        return fresh <= cfg.below or aligned < cfg.min_aligned
