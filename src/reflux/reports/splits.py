"""Charts of the student's accuracy by route and of the parts of its verdicts (such as quality), each with the
teacher's level.
"""

from __future__ import annotations

from dataclasses import dataclass

from reflux.reports.asked import sentence
from reflux.reports.chart import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    Chart,
    add_band,
    add_line,
    new_figure,
    some,
)
from reflux.reports.curves import ends_of, plain
from reflux.reports.evals import EvalPoint, Level, main_name
from reflux.reports.scores import SearchScore
from reflux.reports.units import count, interval, percent

# colours of the routes, in order
_BY_ROUTE = (BLUE, GREEN, PURPLE, ORANGE, GREY)


@dataclass(frozen=True)
class Line:
    """One curve: its points (step, level), and the teacher's level if it was measured."""

    name: str
    colour: str
    points: list[tuple[int, Level]]
    teacher: Level | None


def split_charts(moments: list[EvalPoint]) -> list[Chart]:
    """A chart of accuracy by route if prompts have several routes, and one chart for each part of the
    verdicts. Most runs have neither.
    """
    name = main_name((name for moment in moments for name in moment.splits), "accuracy")
    if name is None:
        return []
    return [*_accuracy(moments, name), *(_part(moments, name, part) for part in _parts(moments, name))]


def _accuracy(moments: list[EvalPoint], name: str) -> list[Chart]:
    routes = sorted(
        {route for moment in moments if name in moment.splits for route in moment.splits[name].routes}
    )
    lines = []
    for route, colour in zip(routes, _cycle(len(routes)), strict=True):
        found = [
            (moment.step, moment.splits[name].routes[route])
            for moment in moments
            if _has(moment, name, route)
        ]
        told = next(
            (
                moment.teacher_split.routes[route]
                for moment in moments
                if route in moment.teacher_split.routes
            ),
            None,
        )
        lines.append(
            Line(
                plain(route),
                colour,
                [(step, _as_level(score)) for step, score in found],
                told and _as_level(told),
            )
        )
    return (
        [_drawn("Accuracy by route", "problems solved", _asked(moments, name), lines, shares=True)]
        if lines
        else []
    )


def _asked(moments: list[EvalPoint], name: str) -> str:
    """The name of the problems of the student's curves, for the start of a caption."""
    return sentence(moment.scores[name].split for moment in moments if name in moment.scores)


def _has(moment: EvalPoint, name: str, route: str) -> bool:
    return name in moment.splits and route in moment.splits[name].routes


def _as_level(score: SearchScore) -> Level:
    return Level(score.accuracy, score.low, score.high)


def _parts(moments: list[EvalPoint], name: str) -> list[str]:
    return sorted({part for moment in moments if name in moment.splits for part in moment.splits[name].parts})


def _part(moments: list[EvalPoint], name: str, part: str) -> Chart:
    measured = [
        (moment.step, moment.splits[name].parts.get(part, {})) for moment in moments if name in moment.splits
    ]
    told = next(
        (moment.teacher_split.parts[part] for moment in moments if part in moment.teacher_split.parts), {}
    )
    routes = sorted({route for _, levels in measured for route in levels if route is not None})
    names: dict[str | None, str] = {route: plain(route) for route in routes} if routes else {None: "student"}
    lines = [
        Line(
            label,
            colour,
            [(step, levels[route]) for step, levels in measured if route in levels],
            told.get(route),
        )
        for (route, label), colour in zip(names.items(), _cycle(len(names)), strict=True)
    ]
    return _drawn(
        f"{plain(part).capitalize()} by step",
        f"mean {plain(part)}",
        _asked(moments, name),
        lines,
        shares=False,
    )


def _cycle(many: int) -> list[str]:
    return [_BY_ROUTE[index % len(_BY_ROUTE)] for index in range(many)]


def _drawn(title: str, unit: str, asked: str, lines: list[Line], *, shares: bool) -> Chart:
    """The student's curves are solid with dots; the teacher's are dashed, in the same colour."""
    hover, layout = (
        ("%{y:.1%}", {"yaxis_tickformat": ".0%", "yaxis_rangemode": "tozero"}) if shares else ("%{y:.3f}", {})
    )
    figure = new_figure("step", unit, layout)
    steps = [step for line in lines for step, _ in line.points]
    numbers: list[tuple[str, ...]] = []
    for line in lines:
        add_band(figure, [(step, level.low, level.high) for step, level in line.points], line.colour)
        values = [level.value for _, level in line.points]
        add_line(figure, [step for step, _ in line.points], values, line.name, line.colour, hover, dots=True)
        numbers += some([(line.name, count(step), *_cells(level, shares)) for step, level in line.points])
        if line.teacher is not None and steps:
            add_line(
                figure, ends_of(steps), [line.teacher.value] * 2, f"teacher: {line.name}", line.colour, hover
            )
            figure.data[-1].update(mode="lines", line={"dash": "dash", "color": line.colour, "width": 2})
            numbers.append((f"teacher: {line.name}", "", *_cells(line.teacher, shares)))
    dashed = " Dashed lines are the teacher." if any(line.teacher is not None for line in lines) else ""
    caption = f"{asked}; the band is the 95 % interval.{dashed}"
    return Chart(
        title,
        figure,
        caption=caption,
        header=("", "step", "accuracy" if shares else "mean", "95 % interval"),
        rows=numbers,
    )


def _cells(level: Level, shares: bool) -> tuple[str, str]:
    if shares:
        return percent(level.value), interval(level.low, level.high)
    known = level.low is not None and level.high is not None
    return f"{level.value:.3f}", f"{level.low:.3f} to {level.high:.3f}" if known else interval(None, None)
