"""Chart of the release rule: the teacher's margin by segment, and the share of attempts released after each
segment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reflux.reports.chart import BLUE, GREEN, GREY, ORANGE, PURPLE, Chart, add_line, new_figure, some
from reflux.reports.curves import plain
from reflux.reports.reading import Row, items, number, table, whole
from reflux.reports.units import count

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# The chart is computed from this many of the last attempts.
_LAST = 2000
# The colours of the single attempts that are drawn.
_EXAMPLES = (ORANGE, GREEN, PURPLE)


@dataclass(frozen=True)
class Judged:
    """One attempt: its name, the mean margin of each segment in nats, and the number of segments up to the
    release, which keep their weight.
    """

    name: str
    margins: tuple[float, ...]
    kept: int

    @property
    def released(self) -> bool:
        return self.kept < len(self.margins)


def release_chart(name: str, attempts: Iterable[Row]) -> Chart:
    """The mean margin of each segment over the last attempts, single attempts with their release point, and
    the share of attempts released after each segment. name: the key of the rule in the recipe, NAME of
    `[credit.NAME]`. attempts: the lines of attempts.jsonl.
    """
    title = "Margin by segment, and share of attempts released"
    found = read_judged(attempts, name)
    if not found:
        return Chart(
            title,
            absent=(
                "No attempt with a margin is on disk: the student has not been trained yet, or no teacher "
                "scored an attempt."
            ),
        )
    released = sum(judged.released for judged in found)
    segments = range(max(len(judged.margins) for judged in found))
    margins_by_segment = [
        [judged.margins[i] for judged in found if i < len(judged.margins)] for i in segments
    ]
    means = [sum(margins) / len(margins) for margins in margins_by_segment]
    ends = [sum(judged.released and judged.kept == i + 1 for judged in found) / len(found) for i in segments]
    figure = _drawn(means, ends, _examples(found))
    caption = (
        "The margin between the teacher's two most likely of the student's candidates, mean over the last "
        f"{count(len(found))} attempts; "
        f"{released / len(found):.0%} of them are released. A diamond marks the last segment that an attempt "
        "keeps."
    )
    numbers = [
        (str(i + 1), f"{means[i]:.3f}", count(len(margins_by_segment[i])), f"{ends[i]:.1%}") for i in segments
    ]
    return Chart(
        title,
        figure,
        caption=caption,
        header=("segment", "mean margin, nats", "attempts", "released after it"),
        rows=some(numbers),
    )


def read_judged(attempts: Iterable[Row], rule: str) -> list[Judged]:
    """The margins and numbers of kept segments of the last attempts on disk, in order. rule: as `name` of
    `release_chart`. Damaged lines are left out.
    """
    return list(deque(_judged(attempts, rule), maxlen=_LAST))


def _judged(lines: Iterable[Row], rule: str) -> Iterable[Judged]:
    for row in lines:
        detail = table(table(row.get("detail")).get(rule))
        margins, kept = (
            [number(margin) for margin in items(detail.get("margins"))],
            whole(detail.get("kept")),
        )
        known = tuple(margin for margin in margins if margin is not None)
        if row.get("kind") == "learned" and known and len(known) == len(margins) and kept is not None:
            yield Judged(f"step {row.get('step')} · {row.get('prompt')}", known, kept)


def _examples(found: list[Judged]) -> list[Judged]:
    """Attempts evenly spaced over those that were read. Only released ones, if there are any."""
    pool = [judged for judged in found if judged.released] or found
    return [
        pool[(2 * index + 1) * len(pool) // (2 * len(_EXAMPLES))]
        for index in range(min(len(_EXAMPLES), len(pool)))
    ]


def _drawn(means: list[float], ends: list[float], examples: list[Judged]) -> Figure:
    figure = new_figure("segment", "margin, nats", {"yaxis_rangemode": "tozero", "hovermode": "closest"})
    places = list(range(1, len(means) + 1))
    figure.add_bar(
        x=places,
        y=ends,
        name="share released after it",
        yaxis="y2",
        marker={"color": GREY, "opacity": 0.35},
        hovertemplate="%{y:.1%}",
    )
    axis = {
        "title": {"text": "share of attempts", "font": {"size": 13}},
        "overlaying": "y",
        "side": "right",
        "showgrid": False,
    }
    figure.update_layout(
        yaxis2={**axis, "rangemode": "tozero", "tickformat": ".0%", "nticks": 5, "automargin": True}
    )
    for judged, colour in zip(examples, _EXAMPLES, strict=False):
        label = plain(judged.name)
        add_line(figure, places[: len(judged.margins)], judged.margins, label, colour, "%{y:.2f} nats")
        figure.data[-1].update(
            mode="lines", line={"color": colour, "width": 1, "dash": "dot"}, showlegend=False
        )
        if judged.released:
            marker = {"symbol": "diamond", "size": 9, "color": colour}
            end = {"x": [judged.kept], "y": [judged.margins[judged.kept - 1]], "marker": marker}
            figure.add_scatter(
                **end, mode="markers", name=label, hovertemplate="the last segment kept", showlegend=False
            )
    add_line(figure, places, means, "mean margin", BLUE, "%{y:.2f} nats")
    figure.data[-1].update(line={"color": BLUE, "width": 3})
    return figure
