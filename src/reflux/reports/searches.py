"""Charts of searches.jsonl: the accepted multiples of extrapolation and the scores on the fixed prompts. Runs
without extrapolation have no such chart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reflux.reports.chart import BLUE, GREY, ORANGE, Chart, add_line, add_points, new_figure, some
from reflux.reports.reading import Row, items, number, table, whole
from reflux.reports.units import NONE, count, duration

UNITS = {
    "accuracy": "accuracy on the fixed prompts",
    "minus_kl": "minus reverse KL on the fixed prompts, nats per token",
}


@dataclass(frozen=True)
class Search:
    """One search of extrapolation: the score before it, the tried pairs (multiple of the displacement,
    score), and the accepted multiple.
    """

    step: int
    kind: str
    here: float | None
    tried: tuple[tuple[int, float | None], ...]
    accepted: int
    delta_norm: float | None
    tokens: float | None
    seconds: float | None

    @property
    def ended(self) -> float | None:
        """The score of the weights at the end of the search."""
        return dict(self.tried).get(self.accepted, self.here)

    @property
    def cells(self) -> tuple[str, ...]:
        said = ", ".join(
            f"{multiple}: {NONE if score is None else f'{score:.3f}'}" for multiple, score in self.tried
        )
        before, length = (NONE if value is None else f"{value:.3g}" for value in (self.here, self.delta_norm))
        return (
            count(self.step),
            before,
            said or "nothing tried",
            count(self.accepted),
            length,
            count(self.tokens),
            duration(self.seconds),
        )


def read_searches(lines: Iterable[Row]) -> list[Search]:
    """The searches in order of step. A line without a step is skipped."""
    found = [(whole(row.get("step")), row) for row in lines]
    return sorted(
        (_search(step, row) for step, row in found if step is not None), key=lambda search: search.step
    )


def _search(step: int, row: Row) -> Search:
    trials = [
        (whole(table(trial).get("multiple")), number(table(trial).get("score")))
        for trial in items(row.get("tried"))
    ]
    return Search(
        step=step,
        kind=str(row.get("score")),
        here=number(row.get("here")),
        tried=tuple((multiple, score) for multiple, score in trials if multiple is not None),
        accepted=whole(row.get("accepted")) or 0,
        delta_norm=number(row.get("delta_norm")),
        tokens=number(row.get("tokens")),
        seconds=number(row.get("seconds")),
    )


def search_charts(searches: list[Search]) -> list[Chart]:
    """Charts of the scores before and after each search, and of the accepted multiples. Empty without a
    search.
    """
    if not searches:
        return []
    return [_scores(searches), _jumps(searches)]


def _scores(searches: list[Search]) -> Chart:
    title = "Extrapolation: scores by search"
    figure = new_figure(
        "step (logarithmic)", UNITS.get(searches[0].kind, "score"), {"xaxis_type": "log", "xaxis_dtick": "D1"}
    )
    lines = {
        "before the search": (GREY, lambda search: search.here),
        "after the search": (BLUE, lambda search: search.ended),
    }
    for name, (colour, value_of) in lines.items():
        points = [(search.step, value) for search in searches if (value := value_of(search)) is not None]
        add_points(figure, points, name, colour, "%{y:.3f}")
    header = ("step", "before", "multiple: score", "accepted", "displacement", "tokens", "time")
    caption = (
        "After some steps, extrapolation tries to move the weights further along their latest displacement. "
        "The score on a few fixed training prompts decides which multiple is accepted."
    )
    return Chart(
        title, figure, caption=caption, header=header, rows=some([search.cells for search in searches])
    )


def _jumps(searches: list[Search]) -> Chart:
    figure = new_figure(
        "step (logarithmic)",
        "accepted multiple",
        {"xaxis_type": "log", "xaxis_dtick": "D1", "yaxis_rangemode": "tozero"},
    )
    steps, values = [search.step for search in searches], [float(search.accepted) for search in searches]
    add_line(figure, steps, values, "accepted multiple", ORANGE, "%{y:.0f} displacements", dots=True)
    caption = "The accepted multiple of the displacement, added to the weights of the step; 0 means none."
    rows = some([(count(search.step), count(search.accepted)) for search in searches])
    return Chart(
        "Extrapolation: accepted multiples",
        figure,
        caption=caption,
        header=("step", "accepted multiple"),
        rows=rows,
    )
