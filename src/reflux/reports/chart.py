"""A chart of the page: a plotly figure, a caption, and its numbers as a table for readers who cannot see the
figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# The Okabe-Ito colours. They can be distinguished with colour blindness and have enough contrast on a white
# and on a black page.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#858a93"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
ROLE_COLOURS = {"sample": BLUE, "reward": PURPLE, "teach": ORANGE, "learn": GREEN, "rest": GREY}


@dataclass
class Chart:
    """One chart. If there is nothing to draw, `figure` is None and `absent` is a sentence with the reason."""

    title: str
    figure: Figure | None = None
    absent: str = ""
    caption: str = ""
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def spec(self) -> dict[str, Any]:
        """The figure as plain JSON values."""
        assert self.figure is not None
        return json.loads(str(self.figure.to_json()))


def new_figure(x: str, y: str, layout: dict[str, Any]) -> Figure:
    """An empty figure. x, y: the titles of the axes. The page's script sets the colours of text and grid in
    the browser, for its light or dark mode.
    """
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        template="none",
        margin={"l": 58, "r": 14, "t": 8, "b": 42},
        height=300,
        hovermode="x unified",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        xaxis={"title": {"text": x, "font": {"size": 13}}, "zeroline": False, "automargin": True},
        yaxis={"title": {"text": y, "font": {"size": 13}}, "automargin": True},
    )
    figure.update_layout(layout)
    return figure


def add_points(
    figure: Figure, points: Sequence[tuple[float, float]], name: str, colour: str, hover: str
) -> None:
    """Add one line through points (x, y), each of them marked. hover: formats the value."""
    add_line(figure, [x for x, _ in points], [y for _, y in points], name, colour, hover, dots=True)


def add_line(
    figure: Figure,
    x: Sequence[float],
    y: Sequence[float],
    name: str,
    colour: str,
    hover: str,
    *,
    dots: bool = False,
) -> None:
    """Add one line. dots: mark each point. hover: formats the value, as in "%{y:.3f} nats"."""
    mode = "lines+markers" if dots or len(x) < 3 else "lines"
    figure.add_scatter(
        x=list(x), y=list(y), name=name, mode=mode, line={"color": colour, "width": 2}, hovertemplate=hover
    )


def add_band(figure: Figure, points: Sequence[tuple[float, float | None, float | None]], colour: str) -> None:
    """Add the interval around a line. Points are (x, low, high); points without an interval are left out."""
    known = [(x, low, high) for x, low, high in points if low is not None and high is not None]
    if not known:
        return
    x, low, high = (list(column) for column in zip(*known, strict=True))
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=x, y=low, **edge)
    figure.add_scatter(x=x, y=high, fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.18)", **edge)


def step_chart(
    title: str,
    unit: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    caption: str = "",
    digits: str = ".3g",
) -> Chart:
    """A chart of named lines over optimiser steps. A line is a sequence of points (step, value)."""
    if not any(lines.values()):
        return Chart(title, absent="No step has recorded this yet.")
    figure = new_figure("step", unit, {})
    numbers: list[tuple[str, ...]] = []
    for place, (name, points) in enumerate(lines.items()):
        # plotly interprets some markup in names, so markup characters are replaced
        shown = name.replace("<", "‹").replace(">", "›").replace("&", "+")[:40]
        colour = COLOURS[place % len(COLOURS)]
        add_line(
            figure,
            [step for step, _ in points],
            [value for _, value in points],
            shown,
            colour,
            f"%{{y:{digits}}}",
        )
        numbers += some([(shown, f"{step:.0f}", f"{value:{digits}}") for step, value in points])
    return Chart(title, figure, caption=caption, header=("", "step", unit), rows=numbers)


def some(rows: list[tuple[str, ...]], limit: int = 25) -> list[tuple[str, ...]]:
    """At most `limit` of the rows of a table, evenly spaced, the first and the last included."""
    if len(rows) <= limit:
        return rows
    return [rows[round(index * (len(rows) - 1) / (limit - 1))] for index in range(limit)]
