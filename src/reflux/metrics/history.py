"""The recorded numbers of a run that its alarms read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
# the newest rows that a history keeps, for the median of the sampling times
_KEPT = 100


def number(row: Row, *path: str) -> float | None:
    """A number of a row by the path of its key; None if it is missing or null."""
    found: Any = row
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


@dataclass(frozen=True)
class Measured:
    """An accuracy of an evaluation, with its interval and the optimiser step."""

    accuracy: float
    low: float
    high: float
    step: int


@dataclass
class History:
    """What the alarms read: the recorded numbers so far, and two numbers of the machine."""

    # the number of rows that numbers are averaged over, as in [health]
    window: int
    # the first `window` rows of metrics.jsonl since the length limit last changed
    first: list[Row] = field(default_factory=list)
    # the number of rows since then
    alike: int = 0
    # the newest rows, in order
    recent: list[Row] = field(default_factory=list)
    # the length limit of the newest row's attempts, in positions
    limit: int = 0
    # True if training attempts are cut on purpose: their limit is below that of evaluations
    cut: bool = False
    # by evaluation: its accuracies in order
    scores: dict[str, list[Measured]] = field(default_factory=dict)
    # wall-clock seconds of the steps since the last checkpoint
    unsaved_s: float = 0.0
    # the size of the last checkpoint with the exported student; None before there is one
    saved_bytes: int | None = None
    # the free space in the run directory; None if it was not measured
    free_bytes: int | None = None

    def add(self, row: Row, limit: int, cut: bool) -> None:
        """Add a row of metrics.jsonl. limit, cut: see the fields."""
        if limit != self.limit:
            self.first, self.alike = [], 0
        self.limit, self.cut, self.alike = limit, cut, self.alike + 1
        self.first = [*self.first, row][: self.window]
        self.recent = [*self.recent, row][-max(_KEPT, self.window) :]
        self.unsaved_s += row["seconds"]["total"]

    def evaluated(self, row: Row) -> None:
        """Add a row of evals.jsonl. Only accuracies that have an interval count."""
        for name, found in row.items():
            if not isinstance(found, Mapping) or any(
                found.get(key) is None for key in ("accuracy", "low", "high")
            ):
                continue
            score = Measured(found["accuracy"], found["low"], found["high"], row["step"])
            self.scores.setdefault(name, []).append(score)

    @property
    def newest(self) -> list[Row]:
        """The last `window` rows; none if there are fewer."""
        return self.recent[-self.window :] if len(self.recent) >= self.window else []

    @property
    def settled(self) -> list[Row]:
        """The last `window` rows if they have one length limit, else none."""
        return self.newest if self.alike >= self.window else []

    @property
    def start(self) -> list[Row]:
        """The first `window` rows with the length limit of now; none if they overlap the last `window`."""
        return self.first if self.alike >= 2 * self.window else []
