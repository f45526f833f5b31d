"""Counts of requests, tokens and costs, by the role of the request, such as "teacher" or "rubric"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of a model, in any currency, for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


class Usage:
    """Sums by role and name. `take` gives those of one step, `total` those of the whole process.

    The names of the chat client: requests (answered by the server), cached (answered from disk), replays
    (tries after the first), failed (no answer), invalid (answers whose content could not be used), unmetered
    (answers without token counts), prompt_tokens, completion_tokens, cost (in the currency of the prices).
    """

    def __init__(self) -> None:
        self._new: dict[str, Counter[str]] = {}
        self.total: dict[str, Counter[str]] = {}

    def add(self, role: str, counts: Mapping[str, float]) -> None:
        for sums in (self._new, self.total):
            for name, count in counts.items():
                # A Counter holds any number.
                sums.setdefault(role, Counter())[name] += count  # pyright: ignore[reportArgumentType]

    def take(self) -> dict[str, dict[str, float]]:
        """The sums since the last call, by role; only roles and names that were counted."""
        taken, self._new = self._new, {}
        return {role: dict(sorted(counts.items())) for role, counts in sorted(taken.items())}
