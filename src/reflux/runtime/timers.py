"""Seconds by role, such as "sample" or "learn". The parts add the duration of each model call; the run reads
the sums once per step. With a trace the clock also writes when each call was made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Generic, Self, TypeVar

if TYPE_CHECKING:
    from reflux.config.step_context import SamplingParams
    from reflux.runtime.trace import Trace

Item = TypeVar("Item")


class Clock:
    """trace: gets the spans of the calls; None: they are not recorded."""

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self._seconds: dict[str, float] = {}
        # model calls may end in worker threads
        self._lock = threading.Lock()
        self._last = self._step_began = time.perf_counter()

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

    def spent(
        self, track: str, role: str, began: float, *, step: int | None = None, group: str | None = None
    ) -> None:
        """Add the seconds since `began` (of time.perf_counter) to a role, and the span to the trace.

        track: one of `trace.TRACKS`. step: the optimiser step, from 1. group: the key of a prompt.
        """
        ended = time.perf_counter()
        self.add(role, ended - began)
        if self.trace is not None:
            self.trace.add(track, role, began, ended, {"step": step, "group": group})

    def sampled(self, draw: SamplingParams, began: float) -> None:
        """Add the seconds since `began` as the sampler's work for attempts with these parameters."""
        role, step = _sampling(draw)
        self.spent("sampler", role, began, step=step)

    def sampling(self, draw: SamplingParams) -> AbstractContextManager[None]:
        """Record a call for attempts with these parameters that another process answers."""
        role, step = _sampling(draw)
        return self.span("sampler", role, step=step)

    def span(
        self, track: str, name: str, *, step: int | None = None, group: str | None = None
    ) -> AbstractContextManager[None]:
        """Record the time of a block in the trace. It counts as no seconds of a role."""
        if self.trace is None:
            return nullcontext()
        return self.trace.span(track, name, {"step": step, "group": group})

    def step_ended(self, step: int) -> None:
        """Record the time since the last step ended as that of `step` (from 1)."""
        began, self._step_began = self._step_began, time.perf_counter()
        if self.trace is not None:
            self.trace.add("steps", f"step {step}", began, self._step_began, {"step": step})

    def close(self) -> None:
        if self.trace is not None:
            self.trace.close()


def _sampling(draw: SamplingParams) -> tuple[str, int | None]:
    """The role of the sampler's work, and the optimiser step (from 1) that it is for; None in evaluations."""
    return ("sample", draw.step + 1) if draw.purpose == "train" else (draw.purpose, None)


class Waiting(Generic[Item]):
    """The items of `stream`. The time that is waited for each of them is recorded."""

    def __init__(self, stream: AsyncIterator[Item], clock: Clock):
        self._stream, self._clock = stream, clock

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        with self._clock.span("loop", "wait for attempts"):
            return await anext(self._stream)


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
