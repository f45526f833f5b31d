"""Metrics that can be merged by `+`, and the FLOP of a plain step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np


class Metric(Protocol):
    def __add__(self, other: Self) -> Self: ...

    @property
    def value(self) -> float | None: ...


@dataclass(frozen=True)
class Mean:
    """A mean that merges exactly, whatever the sizes of the parts. None if nothing was counted."""

    total: float = 0.0
    count: float = 0.0

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None

    @classmethod
    def of(cls, values: Iterable[float] | np.ndarray) -> Mean:
        values = np.asarray(list(values) if not isinstance(values, np.ndarray) else values, dtype=np.float64)
        return cls(float(values.sum()), values.size)


@dataclass(frozen=True)
class Sum:
    total: float = 0.0

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    @property
    def value(self) -> float:
        return self.total


@dataclass(frozen=True)
class Max:
    """The largest value; None without values."""

    largest: float = -math.inf

    def __add__(self, other: Max) -> Max:
        return Max(max(self.largest, other.largest))

    @property
    def value(self) -> float | None:
        return None if self.largest == -math.inf else self.largest


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of all values that were added; `value` is the median. All values are kept in memory, so use
    one number per attempt and not per token.
    """

    values: tuple[float, ...] = ()

    def __add__(self, other: Quantiles) -> Quantiles:
        return Quantiles(self.values + other.values)

    @property
    def value(self) -> float | None:
        return float(np.median(self.values)) if self.values else None

    def at(self, share: float) -> float | None:
        return float(np.quantile(self.values, share)) if self.values else None


@dataclass(frozen=True)
class EffectiveShare:
    """The effective sample size (sum w)^2 / sum w^2 of weights, divided by their number: 1 for equal weights,
    1/n where one of n weights is not 0. 0 where all weights are 0, None without weights.
    """

    total: float = 0.0
    squares: float = 0.0
    count: float = 0.0

    def __add__(self, other: EffectiveShare) -> EffectiveShare:
        return EffectiveShare(
            self.total + other.total, self.squares + other.squares, self.count + other.count
        )

    @property
    def value(self) -> float | None:
        if not self.count:
            return None
        return self.total**2 / (self.squares * self.count) if self.squares else 0.0

    @classmethod
    def of(cls, weight: float) -> EffectiveShare:
        return cls(weight, weight**2, 1)


Stats = dict[str, Metric]


def merge(parts: Iterable[Mapping[str, Metric]]) -> Stats:
    """The metrics of several dictionaries added up by name. A name may be missing in some of them."""
    merged: Stats = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name] + metric if name in merged else metric
    return merged


def step_flops(
    student_params: float,
    teacher_params: float,
    prompt_tokens: float,
    sampled_tokens: float,
    trained_tokens: float,
) -> dict[str, float]:
    """FLOP of a plain step by role: sample 2 S (P + n), teach 2 T (P + n), learn 6 S (P + m).

    S and T are active parameters, embeddings included. P, n and m are prompt, sampled and trained
    tokens, summed over the batch; the prompt counts once per rollout. In a plain step each attempt has one
    turn, the teacher reads the same prompt as the student, and no other outputs or scores are computed. A
    run's metrics add up what was really computed (`reflux.metrics.flops.flops`); for a plain step the result
    is the same. Attention's quadratic term is left out (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).

    Raises ValueError for a negative count, or for more trained than sampled tokens.
    """
    counts = (student_params, teacher_params, prompt_tokens, sampled_tokens, trained_tokens)
    if min(counts) < 0 or trained_tokens > sampled_tokens:
        raise ValueError(
            f"counts must be >= 0, and trained tokens must not exceed the sampled tokens, got {counts}"
        )
    read = prompt_tokens + sampled_tokens
    return {
        "sample": 2.0 * student_params * read,
        "teach": 2.0 * teacher_params * read,
        "learn": 6.0 * student_params * (prompt_tokens + trained_tokens),
    }


def jsonable(value: object) -> object:
    """The value as plain JSON. Metrics become numbers. NaN and infinity become null, because JSON has no
    notation for them.
    """
    if isinstance(value, (Mean, Sum, Max, Quantiles, EffectiveShare)):
        value = value.value
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
