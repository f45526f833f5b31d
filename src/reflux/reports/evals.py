"""evals.jsonl as scores, agreements and examples. Texts are kept of the first and the last moment only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from reflux.reports.reading import Row, items, number, table, whole
from reflux.reports.scores import Score, score


@dataclass(frozen=True)
class Bin:
    """Mean reverse KL over `width` positions from `position` on, nats per token, with its interval."""

    position: int
    width: int
    kl_nats: float
    low: float | None
    high: float | None
    tokens: int | None

    @property
    def middle(self) -> float:
        return self.position + (self.width - 1) / 2

    @property
    def positions(self) -> str:
        return str(self.position) if self.width == 1 else f"{self.position} to {self.position + self.width - 1}"


@dataclass(frozen=True)
class Agreement:
    """How far student and teacher are apart on held-out problems."""

    kl_nats: float | None
    bins: tuple[Bin, ...]


@dataclass
class Moment:
    """One evaluation moment: what was measured of the student, by the name of the evaluation, and of its teacher."""

    step: int
    teacher: Score | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    examples: dict[str, list[Row]] = field(default_factory=dict)


def read_evals(lines: Iterable[Row]) -> list[Moment]:
    """The moments in order of step; a line without a step is skipped."""
    moments: list[Moment] = []
    for row in lines:
        step = whole(row.get("step"))
        if step is None:
            continue
        moments.append(_moment(step, row))
        for earlier in moments[1:-1]:
            earlier.examples.clear()
    return sorted(moments, key=lambda moment: moment.step)


def _moment(step: int, row: Row) -> Moment:
    moment = Moment(step)
    for name, value in row.items():
        found, agreement = score(value), _agreement(value)
        if name == "teacher_accuracy":
            moment.teacher = found
        elif found is not None:
            moment.scores[name] = found
            moment.examples[name] = [entry for entry in items(table(value).get("examples")) if isinstance(entry, dict)]
        elif agreement is not None:
            moment.agreements[name] = agreement
    return moment


def _agreement(value: object) -> Agreement | None:
    entry = table(value)
    bins = tuple(found for raw in items(entry.get("by_position")) if (found := _bin(table(raw))) is not None)
    kl_nats = number(entry.get("kl_nats"))
    return None if kl_nats is None and not bins else Agreement(kl_nats, bins)


def _bin(raw: Row) -> Bin | None:
    position, kl_nats = whole(raw.get("position")), number(raw.get("kl_nats"))
    if position is None or kl_nats is None:
        return None
    width = max(1, whole(raw.get("width")) or 1)
    return Bin(position, width, kl_nats, number(raw.get("low")), number(raw.get("high")), whole(raw.get("tokens")))


def main_name(names: Iterable[str], preferred: str) -> str | None:
    """The preferred name where it was measured, else the first one."""
    found = list(dict.fromkeys(names))
    return preferred if preferred in found else next(iter(found), None)
