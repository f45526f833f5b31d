"""The form of the figures in docs/: SVG with text that can be searched, and the same bytes for the same
numbers.

This file has no command of its own. It needs matplotlib, which `pip install '.[test]'` brings.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from reflux.storage.files import write_text

BLUE, ORANGE, GREY = "#2563eb", "#c2410c", "#6b7280"
# Ids of an SVG come from this text and from nothing else.
SALT = "reflux"


def axes(across: str, up: str) -> tuple[Any, Any]:
    """An empty (figure, axes) with the titles of both directions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e5e7eb", linewidth=0.8)
    ax.set_axisbelow(True)
    return figure, ax


def save(figure: Any, path: Path) -> None:
    """Write the figure as SVG."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": SALT}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib ends lines with a space
    write_text(path, "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n")
