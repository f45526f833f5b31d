"""Which teacher was asked about how many attempts, and how far the student was from it: a starved or unused
one shows here.
"""

from __future__ import annotations

from reflux.reports.formatting import visible
from reflux.reports.metrics import Heard
from reflux.reports.reading import Row, items, table
from reflux.reports.units import NONE, count, percent

# the first and the last tenth of the steps
PART = 10
HEADER = (
    "teacher",
    "answers as",
    "routes",
    "attempts asked",
    "share",
    "KL where learnt from, at first, nats",
    "at last, nats",
)


def teachers_table(config: Row, steps_by_table: dict[str, list[Heard]]) -> list[tuple[str, ...]]:
    """A row of `HEADER` per teacher table; empty where no step has reported.

    KL: mean of log p - log q of the sampled tokens that were learnt from, on the attempts this table was
    asked about, nats per token, over the first and the last tenth of the steps, each step by its attempts.
    """
    asked = {name: sum(step.asked or 0 for step in steps) for name, steps in steps_by_table.items()}
    everything = sum(asked.values())
    rows = []
    for name, steps in steps_by_table.items():
        settings = table(table(config.get("teachers")).get(name))
        part = max(1, len(steps) // PART)
        share = percent(asked[name] / everything, 0) if everything else NONE
        routes = ", ".join(map(str, items(settings.get("routes")))) or "all"
        told = (visible(name), visible(str(settings.get("as") or name)), visible(routes))
        kls = (_kl(steps[:part]), _kl(steps[-part:]))
        rows.append((*told, count(asked[name]) if asked[name] else "never asked", share, *kls))
    return rows


def _kl(steps: list[Heard]) -> str:
    known = [(step.kl_nats, step.asked) for step in steps if step.kl_nats is not None and step.asked]
    weight = sum(asked for _, asked in known)
    return f"{sum(kl * asked for kl, asked in known) / weight:.4f}" if weight else NONE
