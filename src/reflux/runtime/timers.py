"""Seconds by role, such as "sample" or "learn". The parts add the duration of each model call; the run reads
the sums once per step.
"""

from __future__ import annotations

import threading
import time


class Clock:
    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        # model calls may end in worker threads
        self._lock = threading.Lock()
        self._last = time.perf_counter()

    def add(self, role: str, seconds: float) -> None:
        with self._lock:
            self._seconds[role] = self._seconds.get(role, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds by role since the last call of `take`, and the wall-clock time since then as `total`."""
        now = time.perf_counter()
        with self._lock:
            taken, self._seconds = self._seconds, {}
        taken["total"], self._last = now - self._last, now
        return {role: round(seconds, 6) for role, seconds in taken.items()}


class Overlapping:
    """The time in which at least one of several calls is in progress: each second of it counts once."""

    def __init__(self) -> None:
        # calls in progress, and the moment up to which their time was told
        self.calls, self._told = 0, 0.0

    def begin(self) -> None:
        if not self.calls:
            self._told = time.perf_counter()
        self.calls += 1

    def end(self) -> float:
        """The seconds since the last `end`, or since the first of the calls in progress began."""
        self.calls -= 1
        before, self._told = self._told, time.perf_counter()
        return self._told - before
