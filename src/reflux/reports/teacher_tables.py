"""The report's table of teachers: the number of attempts that each teacher was asked to score, and the
student's KL to this teacher. It shows whether a teacher is used too little or not at all.
"""

from __future__ import annotations

from reflux.reports.formatting import visible
from reflux.reports.metrics import Heard
from reflux.reports.reading import Row, items, table
from reflux.reports.units import NONE, count, percent

# the KL is a mean over the first and over the last tenth of the steps
PART = 10
HEADER = ("teacher", "alias", "routes", "attempts", "share", "KL, first steps, nats", "KL, last steps, nats")


def teachers_table(config: Row, steps_by_table: dict[str, list[Heard]]) -> list[tuple[str, ...]]:
    """One row with the columns of `HEADER` for each teacher (each `[teachers.NAME]`). Empty if no step names
    a teacher. config: the recipe of the run. steps_by_table: `Metrics.teachers`.

    KL: the mean of log p - log q of the sampled tokens that were trained on, on the attempts that this
    teacher was asked to score, in nats per token. There is one mean over the first and one over the last
    tenth of the steps, with each step weighted by its number of attempts.
    """
    asked = {name: sum(step.asked or 0 for step in steps) for name, steps in steps_by_table.items()}
    everything = sum(asked.values())
    rows = []
    for name, steps in steps_by_table.items():
        settings = table(table(config.get("teachers")).get(name))
        part = max(1, len(steps) // PART)
        share = percent(asked[name] / everything, 0) if everything else NONE
        routes = ", ".join(map(str, items(settings.get("routes")))) or "all"
        told = (visible(name), visible(str(settings.get("alias") or name)), visible(routes))
        kls = (_kl(steps[:part]), _kl(steps[-part:]))
        rows.append((*told, count(asked[name]) if asked[name] else "never asked", share, *kls))
    return rows


def _kl(steps: list[Heard]) -> str:
    known = [(step.kl_nats, step.asked) for step in steps if step.kl_nats is not None and step.asked]
    weight = sum(asked for _, asked in known)
    return f"{sum(kl * asked for kl, asked in known) / weight:.4f}" if weight else NONE
