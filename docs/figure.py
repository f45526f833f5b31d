"""The README's figure from a run directory: `python docs/figure.py runs/quickstart` writes
docs/quickstart.svg.

A second argument names another file to write. The curve and the teacher's line are on the problems of
`evals.accuracy`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "studies"))

from figures import BLUE, ORANGE, axes, save  # noqa: E402

from reflux.storage.files import read_lines  # noqa: E402


def figure(run: Path) -> Any:
    """Accuracy by step with its 95 % interval, and the teacher's accuracy."""
    rows = [row for row in read_lines(run / "evals.jsonl") if "accuracy" in row]
    steps = [row["step"] for row in rows]
    teacher = next((row["teacher_accuracy"]["accuracy"] for row in rows if "teacher_accuracy" in row), None)
    shares = {key: [row["accuracy"][key] for row in rows] for key in ("accuracy", "low", "high")}
    drawn, ax = axes("optimiser step", "accuracy")
    ax.fill_between(steps, shares["low"], shares["high"], color=BLUE, alpha=0.15, linewidth=0)
    ax.plot(steps, shares["accuracy"], color=BLUE)
    after = shares["accuracy"][-1]
    beside = {"xytext": (6, 0), "textcoords": "offset points"}
    ax.annotate(f"student {after:.1%}", (steps[-1], after), color=BLUE, va="top", **beside)
    if teacher is not None:
        ax.axhline(teacher, color=ORANGE, linestyle="--")
        ax.annotate(f"teacher {teacher:.0%}", (steps[-1], teacher), color=ORANGE, va="center", **beside)
    ax.set_xticks(steps)
    ax.set_xlim(0, steps[-1])
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter("{x:.0%}")
    return drawn


if __name__ == "__main__":
    save(figure(Path(sys.argv[1])), Path(sys.argv[2]) if len(sys.argv) > 2 else DOCS / "quickstart.svg")
