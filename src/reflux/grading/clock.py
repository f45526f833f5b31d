"""Compares times of day."""

from __future__ import annotations

import re

TIME = re.compile(r"(?:at\s+)?(\d{1,2}):(\d\d)(?::(\d\d))?(?:\s*([ap])\.?\s?m\b\.?)?", re.IGNORECASE)


def same_time(found: str, gold: str) -> bool | None:
    """True if both are the same time: "3:30 PM" equals "15:30" and "03:30 p.m.". A time without "AM" or "PM"
    also equals the same time with it. None if one of them is not a time.
    """
    times = [TIME.fullmatch(text) for text in (found, gold)]
    if times[0] is None or times[1] is None:
        return None
    ours, theirs = (_seconds(time) for time in times if time is not None)
    if ours == theirs:
        return True
    halves = [time[4] for time in times if time is not None]
    if None not in halves or halves == [None, None]:
        return False
    without = ours if halves[0] is None else theirs
    return 3600 <= without < 13 * 3600 and ours % (12 * 3600) == theirs % (12 * 3600)


def _seconds(time: re.Match[str]) -> int:
    hours = int(time[1]) % 12 + 12 * (time[4].lower() == "p") if time[4] else int(time[1])
    return hours * 3600 + int(time[2]) * 60 + int(time[3] or 0)
