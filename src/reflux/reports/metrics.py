"""Reads metrics.jsonl in one pass as the columns that the page draws. It keeps a few numbers of each step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from reflux.reports.reading import Row, number, table, texts, whole

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
    """The numbers of one step for one teacher (a table `[teachers.NAME]`)."""

    # The number of attempts that this teacher was asked to score.
    asked: float | None
    # The mean KL over the trained positions, in nats per position.
    kl_nats: float | None


@dataclass
class Metrics:
    """Columns of equal length with one entry per step. A missing or non-finite number is None."""

    step: list[int] = field(default_factory=list)
    # Over all generated positions, estimated from the samples. None where it is not known.
    kl_nats: Column = field(default_factory=list)
    # Over the trained positions, exact where both distributions are known.
    kl_nats_trained: Column = field(default_factory=list)
    staleness_mean: Column = field(default_factory=list)
    staleness_max: Column = field(default_factory=list)
    tokens_sampled: Column = field(default_factory=list)
    tokens_trained: Column = field(default_factory=list)
    # Tokens sampled by extrapolation to score weights. All None without extrapolation.
    tokens_scored: Column = field(default_factory=list)
    # Tokens of attempts that were discarded because extrapolation moved the weights.
    tokens_discarded: Column = field(default_factory=list)
    peak_memory_bytes: Column = field(default_factory=list)
    # All None without log_variance.
    gradient_variance_ratio: Column = field(default_factory=list)
    # All None if no ratio has a bound.
    ratio_outside_share: Column = field(default_factory=list)
    # The number of attempts that could not be graded.
    ungraded: Column = field(default_factory=list)
    # The names of the alarms that held.
    health: list[list[str]] = field(default_factory=list)
    # By NAME of `[teachers.NAME]`: one entry for each step that names this teacher.
    teachers: dict[str, list[Heard]] = field(default_factory=dict)
    # By role: the sums over all steps of what `clients.usage` counts. Empty if no chat server was asked.
    chat: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, Column] = field(default_factory=lambda: {role: [] for role in (*ROLES, "total")})
    flops: dict[str, Column] = field(default_factory=lambda: {role: [] for role in ROLES})

    @property
    def steps_done(self) -> int:
        return max(self.step, default=0)


def read_metrics(lines: Iterable[Row]) -> Metrics:
    """The columns from the lines of metrics.jsonl. A line without a step is skipped."""
    metrics = Metrics()
    for row in lines:
        step = whole(row.get("step"))
        if step is None:
            continue
        metrics.step.append(step)
        for name in _NUMBERS:
            getattr(metrics, name).append(number(row.get(name)))
        metrics.health.append(texts(row.get("health")))
        kls = table(row.get("kl_nats_trained_by_table"))
        for name, asked in table(row.get("asked")).items():
            metrics.teachers.setdefault(name, []).append(Heard(number(asked), number(kls.get(name))))
        for role, counts in table(row.get("chat")).items():
            sums = metrics.chat.setdefault(role, {})
            for name, value in table(counts).items():
                sums[name] = sums.get(name, 0.0) + (number(value) or 0.0)
        for name, columns in (("seconds", metrics.seconds), ("flops", metrics.flops)):
            for role, column in columns.items():
                column.append(number(table(row.get(name)).get(role)))
    return metrics


def known(column: Column) -> list[float]:
    """The numbers of a column, without the Nones."""
    return [value for value in column if value is not None]


def total(column: Column) -> float | None:
    """The sum of the known numbers. None if no number is known."""
    values = known(column)
    return sum(values) if values else None


def rest_of(seconds: dict[str, Column]) -> Column:
    """The seconds of each step that no role accounts for (publishing weights, writing files). None where the
    total is not known.
    """
    parts = zip(*(seconds[role] for role in ROLES), strict=True)
    return [
        None if whole_step is None else max(0.0, whole_step - sum(known(list(part))))
        for whole_step, part in zip(seconds["total"], parts, strict=True)
    ]


def thinned(step: list[int], column: Column, limit: int = 300) -> tuple[list[float], list[float]]:
    """At most `limit` points (step, value), each a mean over neighbouring steps. Nones are left out."""
    points = [(at, value) for at, value in zip(step, column, strict=True) if value is not None]
    size = max(1, -(-len(points) // limit))
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [_mean([at for at, _ in chunk]) for chunk in chunks], [
        _mean([value for _, value in chunk]) for chunk in chunks
    ]


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
