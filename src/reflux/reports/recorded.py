"""The files of a run directory as a part reads them for its diagnostics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reflux.reports.reading import Row, number, rows, table, whole


@dataclass(frozen=True)
class Recorded:
    """Lines of metrics.jsonl, evals.jsonl, attempts.jsonl, and of files that a part writes itself; what is
    damaged is left out.
    """

    folder: Path

    def rows(self, name: str) -> Iterator[Row]:
        """The objects of NAME.jsonl, one after the other; none where there is no such file."""
        return rows(self.folder / f"{name}.jsonl", [])

    def metrics(self, *path: str) -> dict[str, list[tuple[float, float]]]:
        """The numbers of one table of metrics.jsonl, by their names, as (step, value); such as
        `metrics("credit", "prefix")`.
        """
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows("metrics"):
            step, inner = whole(row.get("step")), row
            for key in path:
                inner = table(inner.get(key))
            for name, value in inner.items() if step is not None else ():
                if (known := number(value)) is not None:
                    found.setdefault(name, []).append((float(step or 0), known))
        return found
