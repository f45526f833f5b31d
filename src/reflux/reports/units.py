"""Formats numbers for display. None (not known) is shown as an en dash."""

from __future__ import annotations

import math

NONE = "–"
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def percent(value: float | None, digits: int = 1) -> str:
    """0.8241 -> "82.4 %"."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def interval(low: float | None, high: float | None) -> str:
    """(0.788, 0.855) -> "78.8 to 85.5 %"."""
    return NONE if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"


def count(value: float | None) -> str:
    """12345 -> "12,345"."""
    return NONE if value is None else f"{value:,.0f}"


def scaled(value: float | None, unit: str) -> str:
    """2.5e12, "FLOP" -> "2.50 TFLOP"."""
    if value is None:
        return NONE
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float | None) -> str:
    """87.4 -> "1 min 27 s"."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def signed(value: float | None, digits: int = 3) -> str:
    """-0.5 -> "−0.500", with a real minus sign. A number that rounds to zero has no sign."""
    if value is None:
        return NONE
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("−" if value < 0 else "+") + text


def chance(logp: float) -> str:
    """A log-prob in nats as a probability: -0.693 -> "50.0 %"."""
    return percent(math.exp(min(logp, 0.0)))
