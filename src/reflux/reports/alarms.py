"""The alarms of a run for the page: when each one held, and what to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reflux.metrics.health import ALARMS, Period, periods
from reflux.reports.evals import EvalPoint
from reflux.reports.formatting import visible
from reflux.reports.metrics import Metrics
from reflux.reports.units import count

# periods of one alarm that are shown
_SHOWN = 5


@dataclass(frozen=True)
class ShownAlarm:
    """One alarm of a run."""

    name: str
    # the optimiser steps at which it held, such as "steps 20 to 40, from step 60 on"
    steps: str
    # what a person should look at; "" for an alarm that this version does not know
    look_at: str


def shown_alarms(metrics: Metrics, moments: Sequence[EvalPoint]) -> list[ShownAlarm]:
    """The alarms that held at some step, in the order in which they began."""
    rows = [{"step": step, "health": held} for step, held in zip(metrics.step, metrics.health, strict=True)]
    found: dict[str, list[Period]] = {}
    for period in periods(rows, [{"step": moment.step, "health": moment.health} for moment in moments]):
        found.setdefault(period.name, []).append(period)
    look_at = {str(name): alarm.look_at for name, alarm in ALARMS.items()}
    return [ShownAlarm(visible(name), _steps(each), look_at.get(name, "")) for name, each in found.items()]


def _steps(each: Sequence[Period]) -> str:
    more = len(each) - _SHOWN
    rest = [] if more <= 0 else ["and once more"] if more == 1 else [f"and {more} more times"]
    return ", ".join([*map(_words, each[:_SHOWN]), *rest])


def _words(period: Period) -> str:
    if period.last is None:
        return f"from step {count(period.first)} on"
    if period.last == period.first:
        return f"step {count(period.first)}"
    return f"steps {count(period.first)} to {count(period.last)}"
