"""Schedules: functions from the optimiser step to a number. A field of type `Number` takes a plain number or
a schedule as an inline table.

In a recipe the amounts of a schedule may be shares of another number, for example
`of = "sampler.max_tokens"`; see `reflux.config.shares`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT, PartOf

SCHEDULES = {
    "constant": "reflux.config.schedules:Constant",
    "linear": "reflux.config.schedules:Linear",
    "cosine": "reflux.config.schedules:Cosine",
    "steps": "reflux.config.schedules:Steps",
}
# The fields of each kind that are amounts of the scheduled number. The other fields count optimiser steps.
# `of` multiplies only the amounts.
AMOUNTS = {
    "constant": ("value",),
    "linear": ("start", "stop", "increment"),
    "cosine": ("peak", "floor"),
    "steps": ("values",),
}


@runtime_checkable
class Schedule(Protocol):
    """A frozen value; `schedule(step)` gives the number for optimiser step `step` (from 0)."""

    def __call__(self, step: int) -> float: ...


# float | Schedule; checked by `number`
Number = Annotated[Any, PartOf("schedules")]
# the same, as a function of the position instead of the optimiser step
PositionNumber = Annotated[Any, PartOf("schedules", horizon=False)]


def at(value: float | Schedule, step: int) -> float:
    """The value of a `Number` (a plain number or a schedule) at optimiser step `step` (from 0)."""
    return value(step) if isinstance(value, Schedule) else float(value)


def first_below(value: float | Schedule, bound: float, steps: int) -> int | None:
    """The first step in range(steps) at which a `Number` is below `bound`; None if there is none."""
    return next((step for step in range(steps) if at(value, step) < bound), None)


def number(value: Any, name: str) -> Any:
    """Return `value` if it is a finite number or a schedule; raise ValueError otherwise. name: the key, for
    errors.
    """
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if plain or isinstance(value, Schedule):
        return value
    raise ValueError(
        f'{name} must be a number or a schedule such as {{ kind = "linear", start = 16, increment = 8 }}, '
        f"got {value!r}"
    )


def needs_horizon(value: Any) -> bool:
    """True if `value` is a schedule that depends on a horizon and states none."""
    return (isinstance(value, Cosine) and not value.horizon) or (
        isinstance(value, Linear) and value.increment is None and not value.horizon
    )


@dataclass(frozen=True, config=STRICT)
class Constant:
    """The same number at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True, config=STRICT)
class Linear:
    """start + increment * step, limited by `stop`; without an increment a straight line from start to stop.

    horizon: the step at which this straight line reaches `stop`. warmup: the number of steps over which the
    value rises from near 0.
    """

    start: float
    stop: float | None = None
    increment: float | None = None
    warmup: int = 0
    horizon: int = 0

    def __post_init__(self) -> None:
        if self.increment is None and self.stop is None:
            raise ValueError(
                "a linear schedule needs an increment per step, or a stop that it reaches at its horizon"
            )

    def __call__(self, step: int) -> float:
        rise = _warm(step, self.warmup)
        if self.increment is None:
            assert self.stop is not None
            return rise * (self.start + (self.stop - self.start) * _progress(step, self.warmup, self.horizon))
        value = self.start + self.increment * step
        if self.stop is not None:
            value = min(value, self.stop) if self.increment >= 0 else max(value, self.stop)
        return rise * value


@dataclass(frozen=True, config=STRICT)
class Cosine:
    """A half cosine that falls from peak to floor until step `horizon`, after `warmup` steps of
    linear rise.
    """

    peak: float
    floor: float = 0.0
    warmup: int = 0
    horizon: int = 0

    def __call__(self, step: int) -> float:
        along = _progress(step, self.warmup, self.horizon)
        return _warm(step, self.warmup) * (
            self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * along))
        )


@dataclass(frozen=True, config=STRICT)
class Steps:
    """The value is values[i] from step boundaries[i - 1] on. There is one value more than there are
    boundaries.
    """

    values: tuple[float, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1 or list(self.boundaries) != sorted(
            set(self.boundaries)
        ):
            raise ValueError("a steps schedule needs ascending boundaries and one value more than boundaries")

    def __call__(self, step: int) -> float:
        return self.values[sum(step >= boundary for boundary in self.boundaries)]


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1)) if warmup else 1.0


def _progress(step: int, warmup: int, horizon: int) -> float:
    """0 at the end of the warm-up, rising linearly to 1 at the horizon; 1 after it."""
    return min(1.0, max(0.0, (step - warmup) / max(1, horizon - warmup)))
