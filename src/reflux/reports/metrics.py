"""metrics.jsonl as the columns the page draws: one pass, a few numbers kept of each step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from reflux.reports.reading import Row, number, table, whole

ROLES = ("sample", "reward", "teach", "learn")
_NUMBERS = (
    "kl_nats",
    "kl_nats_trained",
    "staleness_mean",
    "staleness_max",
    "tokens_sampled",
    "tokens_trained",
    "tokens_scored",
    "tokens_discarded",
    "peak_memory_bytes",
    "gradient_variance_ratio",
    "ratio_outside_share",
    "ungraded",
)
Column = list[float | None]


@dataclass(frozen=True)
class Heard:
    """What one step says of one teacher table."""

    # attempts
    asked: float | None
    # over the positions learnt from
    kl_nats: float | None


@dataclass
class Metrics:
    """Columns of equal length, one entry a step. A number that was missing or not finite is None."""

    step: list[int] = field(default_factory=list)
    # over all generated positions, sampled; None where that was not known
    kl_nats: Column = field(default_factory=list)
    # over the positions learnt from, exact where both distributions are known
    kl_nats_trained: Column = field(default_factory=list)
    staleness_mean: Column = field(default_factory=list)
    staleness_max: Column = field(default_factory=list)
    tokens_sampled: Column = field(default_factory=list)
    tokens_trained: Column = field(default_factory=list)
    # by extrapolation; None throughout without one
    tokens_scored: Column = field(default_factory=list)
    # of attempts that a jump threw away
    tokens_discarded: Column = field(default_factory=list)
    peak_memory_bytes: Column = field(default_factory=list)
    # None throughout without log_variance
    gradient_variance_ratio: Column = field(default_factory=list)
    # None throughout where no ratio has a bound
    ratio_outside_share: Column = field(default_factory=list)
    # attempts that could not be judged
    ungraded: Column = field(default_factory=list)
    # by table; the steps that name it
    teachers: dict[str, list[Heard]] = field(default_factory=dict)
    seconds: dict[str, Column] = field(default_factory=lambda: {role: [] for role in (*ROLES, "total")})
    flops: dict[str, Column] = field(default_factory=lambda: {role: [] for role in ROLES})

    @property
    def steps_done(self) -> int:
        return max(self.step, default=0)


def read_metrics(lines: Iterable[Row]) -> Metrics:
    """The columns of a stream of steps. A line without a step is skipped."""
    metrics = Metrics()
    for row in lines:
        step = whole(row.get("step"))
        if step is None:
            continue
        metrics.step.append(step)
        for name in _NUMBERS:
            getattr(metrics, name).append(number(row.get(name)))
        kls = table(row.get("kl_nats_trained_by_table"))
        for name, asked in table(row.get("asked")).items():
            metrics.teachers.setdefault(name, []).append(Heard(number(asked), number(kls.get(name))))
        for name, columns in (("seconds", metrics.seconds), ("flops", metrics.flops)):
            for role, column in columns.items():
                column.append(number(table(row.get(name)).get(role)))
    return metrics


def known(column: Column) -> list[float]:
    """The numbers of a column, without its gaps."""
    return [value for value in column if value is not None]


def total(column: Column) -> float | None:
    """The sum of what is known; None where nothing is."""
    values = known(column)
    return sum(values) if values else None


def rest_of(seconds: dict[str, Column]) -> Column:
    """Seconds of a step that no role accounts for (publishing weights, writing files); None where the total
    is not known.
    """
    parts = zip(*(seconds[role] for role in ROLES), strict=True)
    return [
        None if whole_step is None else max(0.0, whole_step - sum(known(list(part))))
        for whole_step, part in zip(seconds["total"], parts, strict=True)
    ]


def thinned(step: list[int], column: Column, limit: int = 300) -> tuple[list[float], list[float]]:
    """At most `limit` points (step, value): means over runs of neighbouring steps, gaps left out."""
    points = [(at, value) for at, value in zip(step, column, strict=True) if value is not None]
    size = max(1, -(-len(points) // limit))
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [_mean([at for at, _ in chunk]) for chunk in chunks], [
        _mean([value for _, value in chunk]) for chunk in chunks
    ]


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
