"""The access that a part has to the files of a run directory, for its diagnostics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reflux.reports.reading import Row, number, rows, table, whole


@dataclass(frozen=True)
class Recorded:
    """Gives the lines of metrics.jsonl, evals.jsonl, attempts.jsonl, and of files that a part writes itself.
    Damaged lines are left out.
    """

    folder: Path

    def rows(self, name: str) -> Iterator[Row]:
        """The objects of the file NAME.jsonl, one by one. Without such a file there are none."""
        return rows(self.folder / f"{name}.jsonl", [])

    def metrics(self, *path: str) -> dict[str, list[tuple[float, float]]]:
        """The numbers of one table of metrics.jsonl, such as `metrics("credit", "prefix")`: lists of
        (step, value) by name.
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
