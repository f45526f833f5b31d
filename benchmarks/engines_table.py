"""What the parts of engines.py share: what is measured, and the tables that are printed."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """What to measure with."""

    python: str
    student: str
    teacher: str
    prompts: int
    tokens: int
    rounds: int
    threads: int
    folder: Path
    # of a server that runs already and has the weights of both models
    url: str | None = None


@dataclass
class Table:
    """The measurements of each arm, one a round."""

    unit: str
    arms: dict[str, list[float]] = field(default_factory=dict)

    def add(self, arm: str, value: float) -> None:
        self.arms.setdefault(arm, []).append(value)

    def print(self, title: str) -> None:
        first = next(iter(self.arms.values()))
        print(f"\n{title}, {self.unit}")
        for arm, values in self.arms.items():
            ratios = [value / other for value, other in zip(values, first, strict=True)]
            print(f"    {arm:24} {spread(values):32} to the first arm: {spread(ratios)}", flush=True)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


async def in_turns(
    table: Table, rounds: int, arms: dict[str, Callable[[], Awaitable[float]]], warm: bool = True
) -> None:
    """Measure every arm once a round, after a round that is not counted if `warm`."""
    for measure in arms.values() if warm else ():
        await measure()
    names = list(arms)
    for number in range(rounds):
        turn = names[number % len(names) :] + names[: number % len(names)]
        found = {name: await arms[name]() for name in turn}
        for name in names:
            table.add(name, found[name])


def machine(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{named or platform.processor()}, {os.cpu_count()} cores, {threads} threads, load {load}"
