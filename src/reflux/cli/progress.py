"""The live line of a run: step, KL, accuracy, tokens per second, time left."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from reflux.config.recipe import RunConfig
from reflux.reports.asked import problems_of, split_of

# number of the last steps from which speed and time left are computed
_WINDOW = 20
# The first key in metrics is shown: the KL over all positions, or over the trained positions.
_KLS = {"kl_nats": "KL", "kl_nats_trained": "KL of trained positions"}
# seconds between lines if the output is not a terminal
_PLAIN_EVERY_S = 10.0


class Progress:
    """A `Watch` that shows one line. On a terminal the line is updated in place; otherwise a line is
    printed every 10 seconds.
    """

    def __init__(self, console: Console, cfg: RunConfig):
        self._console, self._steps, self._unit = console, cfg.steps, cfg.sampler.rollouts.unit
        self._line = Text("loading models ...")
        self._live = (
            Live(self._line, console=console, refresh_per_second=8, transient=True)
            if console.is_terminal
            else None
        )
        self._accuracy: float | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def stepped(self, metrics: dict[str, Any]) -> None:
        self._recent.append(
            (metrics["seconds"]["total"], max(metrics["tokens_sampled"], metrics["tokens_trained"]))
        )
        seconds = sum(spent for spent, _ in self._recent)
        speed = sum(tokens for _, tokens in self._recent) / max(seconds, 1e-9)
        left_s = (self._steps - metrics["step"]) * seconds / len(self._recent)
        parts = [f"step {metrics['step']}/{self._steps}"]
        for name, label in _KLS.items():
            if metrics.get(name) is not None:
                parts.append(f"{label} {metrics[name]:.4f} nats")
                break
        if metrics.get("reward_mean") is not None:
            parts.append(f"reward {metrics['reward_mean']:.2f}")
        if self._accuracy is not None:
            parts.append(f"accuracy {self._accuracy:.1%}")
        parts += [f"{speed:,.0f} {self._unit}/s", f"{_clock(left_s)} left"]
        self._show("  ".join(parts))

    def evaluated(self, results: dict[str, Any]) -> None:
        accuracy = results.get("accuracy", {}).get("accuracy")
        if accuracy is None:
            return
        self._accuracy = accuracy
        table = results["accuracy"]
        asked = problems_of([split_of(table.get("split"))])
        parts = [f"({table['low']:.1%} to {table['high']:.1%}, {table['problems']} {asked})"]
        parts += [
            f"{name} {table[f'accuracy.{name}']:.1%}"
            for name in _routes(table)
            if table[f"accuracy.{name}"] is not None
        ]
        parts += [f"{name} {table[name]:.3f}" for name in table.get("parts", []) if table[name] is not None]
        self._console.print(
            f"step {results['step']:>4}  accuracy {accuracy:6.1%}  {'  '.join(parts)}",
            highlight=False,
            markup=False,
        )

    def noted(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False)

    def _show(self, line: str) -> None:
        if self._live:
            self._live.update(Text(line))
        elif time.monotonic() - self._printed > _PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self._console.print(line, highlight=False, markup=False)


def _routes(table: dict[str, Any]) -> list[str]:
    """The parts or routes of a task that have an accuracy of their own in `table`."""
    counted = [
        key.removesuffix(".problems")
        for key in table
        if key.startswith("accuracy.") and key.endswith(".problems")
    ]
    return [key.removeprefix("accuracy.") for key in counted]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
