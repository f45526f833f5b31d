"""Reads evals.jsonl as scores, agreements and examples. Texts and images are kept only of the first and the
last evaluation moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from reflux.reports.asked import split_of
from reflux.reports.reading import Row, items, number, table, texts, whole
from reflux.reports.scores import SearchScore, score


@dataclass(frozen=True)
class Bin:
    """The mean reverse KL at positions `position` to `position` + `width` - 1, in nats per position, with its
    interval. counted: the number of values in this mean.
    """

    position: int
    width: int
    kl_nats: float
    low: float | None
    high: float | None
    counted: int | None

    @property
    def middle(self) -> float:
        return self.position + (self.width - 1) / 2

    @property
    def positions(self) -> str:
        return (
            str(self.position) if self.width == 1 else f"{self.position} to {self.position + self.width - 1}"
        )


@dataclass(frozen=True)
class AgreementPoint:
    """The reverse KL from student to teacher on the problems of a split."""

    kl_nats: float | None
    bins: tuple[Bin, ...]
    split: str | None = None


@dataclass(frozen=True)
class Level:
    """The mean of one part of the verdicts (such as quality), with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ProblemSplit:
    """An accuracy by route (or by part of a mix), and the means of the parts of the verdicts, by part name.
    Each is a mean over all problems (key None) and by route.
    """

    routes: dict[str, SearchScore] = field(default_factory=dict)
    parts: dict[str, dict[str | None, Level]] = field(default_factory=dict)


@dataclass
class EvalPoint:
    """The results of one evaluation moment: the student's by evaluation name, and the teacher's."""

    step: int
    teacher: SearchScore | None = None
    teacher_split: ProblemSplit = field(default_factory=ProblemSplit)
    teacher_examples: list[Row] = field(default_factory=list)
    scores: dict[str, SearchScore] = field(default_factory=dict)
    splits: dict[str, ProblemSplit] = field(default_factory=dict)
    agreements: dict[str, AgreementPoint] = field(default_factory=dict)
    examples: dict[str, list[Row]] = field(default_factory=dict)
    # the names of the alarms that held
    health: list[str] = field(default_factory=list)


def read_evals(lines: Iterable[Row]) -> list[EvalPoint]:
    """The evaluation moments in order of step. A line without a step is skipped."""
    moments: list[EvalPoint] = []
    for row in lines:
        step = whole(row.get("step"))
        if step is None:
            continue
        moments.append(_moment(step, row))
        for earlier in moments[1:-1]:
            earlier.examples.clear()
    return sorted(moments, key=lambda moment: moment.step)


def _moment(step: int, row: Row) -> EvalPoint:
    moment = EvalPoint(step, health=texts(row.get("health")))
    for name, value in row.items():
        found, agreement = score(value), _agreement(value)
        examples = [entry for entry in items(table(value).get("examples")) if isinstance(entry, dict)]
        if name == "teacher_accuracy":
            moment.teacher, moment.teacher_split, moment.teacher_examples = (
                found,
                split(table(value)),
                examples,
            )
            continue
        if examples:
            # examples are kept even if nothing could be graded
            moment.examples[name] = examples
        if found is not None:
            moment.scores[name], moment.splits[name] = found, split(table(value))
        elif agreement is not None:
            moment.agreements[name] = agreement
    return moment


def split(entry: Row) -> ProblemSplit:
    """The results of one evaluation by route, and the means of the parts of the verdicts."""
    routes = {}
    for key in entry:
        name = key.removeprefix("accuracy.").removesuffix(".problems")
        if key == f"accuracy.{name}.problems" and (found := _score(entry, f"accuracy.{name}")) is not None:
            routes[name] = found
    parts: dict[str, dict[str | None, Level]] = {}
    for part in map(str, items(entry.get("parts"))):
        known = {
            route: _level(entry, part if route is None else f"{part}.{route}") for route in (None, *routes)
        }
        parts[part] = {route: level for route, level in known.items() if level is not None}
    return ProblemSplit(routes, {part: levels for part, levels in parts.items() if levels})


def _score(entry: Row, key: str) -> SearchScore | None:
    ends = {end: entry.get(f"{key}.{end}") for end in ("low", "high", "problems")}
    return score({"accuracy": entry.get(key), **ends})


def _level(entry: Row, key: str) -> Level | None:
    value = number(entry.get(key))
    return (
        None
        if value is None
        else Level(value, number(entry.get(f"{key}.low")), number(entry.get(f"{key}.high")))
    )


def _agreement(value: object) -> AgreementPoint | None:
    entry = table(value)
    bins = tuple(found for raw in items(entry.get("by_position")) if (found := _bin(table(raw))) is not None)
    kl_nats = number(entry.get("kl_nats"))
    return (
        None if kl_nats is None and not bins else AgreementPoint(kl_nats, bins, split_of(entry.get("split")))
    )


def _bin(raw: Row) -> Bin | None:
    position, kl_nats = whole(raw.get("position")), number(raw.get("kl_nats"))
    if position is None or kl_nats is None:
        return None
    width = max(1, whole(raw.get("width")) or 1)
    return Bin(
        position,
        width,
        kl_nats,
        number(raw.get("low")),
        number(raw.get("high")),
        whole(raw.get("tokens", raw.get("steps"))),
    )


def main_name(names: Iterable[str], preferred: str) -> str | None:
    """The evaluation that the page shows: `preferred` if it is among `names`, else the first name. None if
    there is no name.
    """
    found = list(dict.fromkeys(names))
    return preferred if preferred in found else next(iter(found), None)
