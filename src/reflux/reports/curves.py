"""Charts of training progress: accuracy by step, KL by step, KL by position before and after training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reflux.reports.asked import problems_of, sentence
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
from reflux.reports.evals import AgreementPoint, EvalPoint, main_name
from reflux.reports.formatting import visible
from reflux.reports.metrics import Column, Metrics, known, thinned
from reflux.reports.scores import SearchScore
from reflux.reports.units import count
from reflux.reports.words import TEXTS, Words

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_OTHERS = (GREEN, PURPLE, GREY)


def accuracy_chart(moments: list[EvalPoint], teacher: SearchScore | None) -> Chart:
    """The share of problems solved by step, with its 95 % interval, and the teacher's accuracy as a line.

    The line of the teacher is the accuracy on the problems of the evaluations during the run, if this was
    measured. Otherwise it is `teacher`, the teacher's accuracy in summary.json.
    """
    title = "Accuracy by step"
    teacher = next((moment.teacher for moment in moments if moment.teacher is not None), teacher)
    first = main_name((name for moment in moments for name in moment.scores), "accuracy")
    if first is None:
        return Chart(
            title, absent="No accuracy was measured in this run (evals.jsonl has none), so there is no curve."
        )
    figure = new_figure("step", "problems solved", {"yaxis_tickformat": ".0%", "yaxis_rangemode": "tozero"})
    names = sorted(
        {name for moment in moments for name in moment.scores}, key=lambda name: (name != first, name)
    )
    numbers: list[tuple[str, ...]] = []
    for index, name in enumerate(names):
        colour = BLUE if index == 0 else _OTHERS[(index - 1) % len(_OTHERS)]
        points = [(moment.step, moment.scores[name]) for moment in moments if name in moment.scores]
        add_band(figure, [(step, score.low, score.high) for step, score in points], colour)
        label = "student" if index == 0 else plain(name)
        values = [score.accuracy for _, score in points]
        add_line(figure, [step for step, _ in points], values, label, colour, "%{y:.1%}", dots=True)
        numbers += some([(label, count(step), *score.cells) for step, score in points])
    if teacher is not None:
        _add_teacher(figure, teacher, [moment.step for moment in moments])
        numbers.append(("teacher", "", *teacher.cells))
    scores = [score for moment in moments for score in moment.scores.values()] + (
        [teacher] if teacher is not None else []
    )
    caption = f"{sentence(score.split for score in scores)}; the band is the 95 % interval."
    return Chart(
        title,
        figure,
        caption=caption,
        header=("", "step", "accuracy", "95 % interval", "problems"),
        rows=numbers,
    )


def ends_of(steps: list[int]) -> list[float]:
    """The two x values at which a horizontal line across these steps begins and ends."""
    return [min(steps), max(steps)] if max(steps) > min(steps) else [min(steps) - 0.5, max(steps) + 0.5]


def _add_teacher(figure: Figure, teacher: SearchScore, steps: list[int]) -> None:
    ends = ends_of(steps)
    add_band(figure, [(step, teacher.low, teacher.high) for step in ends], ORANGE)
    add_line(figure, ends, [teacher.accuracy] * 2, "teacher", ORANGE, "%{y:.1%}")
    figure.data[-1].update(mode="lines", line={"dash": "dash", "color": ORANGE, "width": 2})


def kl_chart(metrics: Metrics, moments: list[EvalPoint], words: Words = TEXTS) -> Chart:
    """Reverse KL from student to teacher in nats per position, on the training attempts of each step and on
    the problems of evaluations.
    """
    unit = f"nats per {words.unit}"
    title = "Distance to the teacher by step"
    lines = [(label, colour, *thinned(metrics.step, column)) for label, colour, column in _trained(metrics)]
    values = [value for _, _, _, column in lines for value in column]
    name = main_name((name for moment in moments for name in moment.agreements), "agreement")
    measured = (
        [(moment.step, moment.agreements[name]) for moment in moments if name in moment.agreements]
        if name is not None
        else []
    )
    held = [(step, found.kl_nats) for step, found in measured if found.kl_nats is not None]
    asked = problems_of(found.split for _, found in measured)
    if not values and not held:
        absent = "No step has recorded a KL to the teacher (metrics.jsonl and evals.jsonl have none)."
        return Chart(title, absent=absent)
    everything = values + [value for _, value in held]
    far = min(everything) > 0 and max(everything) / min(everything) > 20
    figure = new_figure("step", f"reverse KL, {unit}", {"yaxis_type": "log" if far else "linear"})
    if not far:
        figure.update_yaxes(rangemode="tozero")
    for label, colour, steps, column in lines:
        add_line(figure, steps, column, label, colour, "%{y:.4f} nats")
    if held:
        steps, column = [step for step, _ in held], [value for _, value in held]
        add_line(figure, steps, column, asked, ORANGE, "%{y:.4f} nats", dots=True)
    numbers: list[tuple[str, ...]] = []
    for label, _, steps, column in lines:
        numbers += some(
            [(label, f"{step:.0f}", f"{value:.4f}") for step, value in zip(steps, column, strict=True)]
        )
    numbers += some([(asked, count(step), f"{value:.4f}") for step, value in held])
    caption = f"Reverse KL from student to teacher, {unit}" + (", on a logarithmic scale." if far else ".")
    if known(metrics.kl_nats):
        caption += (
            " Training attempts: mean over every generated position, "
            f"{'computed exactly' if words.images else 'estimated from the sampled tokens'}."
        )
    if known(metrics.kl_nats_trained):
        caption += (
            " Trained positions: mean over positions with a non-zero weight, exact where both distributions"
            " are known."
        )
    if any(
        len(known(column)) > len(steps)
        for (*_, column), (_, _, steps, _) in zip(_trained(metrics), lines, strict=True)
    ):
        caption += " Each point is the mean of several steps."
    return Chart(title, figure, caption=caption, header=("", "step", unit), rows=numbers)


def _trained(metrics: Metrics) -> list[tuple[str, str, Column]]:
    """(label, colour, column) of the two curves on training attempts. A curve without numbers is left out."""
    columns = [
        ("training attempts", BLUE, metrics.kl_nats),
        ("training attempts, trained positions", GREEN, metrics.kl_nats_trained),
    ]
    return [(label, colour, column) for label, colour, column in columns if known(column)]


def position_chart(moments: list[EvalPoint], words: Words = TEXTS) -> Chart:
    """Reverse KL by position on the problems of an evaluation, at the first and at the last evaluation that
    measured it.
    """
    title = f"Distance to the teacher by {words.position}"
    measured = [
        (moment.step, found) for moment in moments for found in moment.agreements.values() if found.bins
    ]
    if not measured:
        return Chart(
            title, absent="Agreement by position was not measured in this run (evals.jsonl has none)."
        )
    figure = new_figure(words.axis, f"reverse KL, nats per {words.unit}", {"yaxis_rangemode": "tozero"})
    numbers: list[tuple[str, ...]] = []
    ends = [measured[0], measured[-1]] if measured[-1][0] > measured[0][0] else [measured[0]]
    for (step, found), colour in zip(ends, (GREY, BLUE), strict=False):
        numbers += _add_positions(figure, step, found, colour)
    caption = f"{sentence(found.split for _, found in ends)}; the band is the 95 % interval."
    if len(ends) == 1:
        caption += f" It was measured at step {ends[0][0]} only, so there is no second curve."
    return Chart(
        title,
        figure,
        caption=caption,
        header=("", words.position, "nats", "95 % interval", words.units),
        rows=numbers,
    )


def _add_positions(figure: Figure, step: int, found: AgreementPoint, colour: str) -> list[tuple[str, ...]]:
    bins = sorted(found.bins, key=lambda entry: entry.position)
    add_band(figure, [(entry.middle, entry.low, entry.high) for entry in bins], colour)
    name = "before (step 0)" if step == 0 else f"after step {step}"
    add_line(
        figure,
        [entry.middle for entry in bins],
        [entry.kl_nats for entry in bins],
        name,
        colour,
        "%{y:.4f} nats",
        dots=True,
    )
    return some(
        [
            (
                name,
                entry.positions,
                f"{entry.kl_nats:.4f}",
                _nats_interval(entry.low, entry.high),
                count(entry.counted),
            )
            for entry in bins
        ]
    )


def _nats_interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def plain(name: str) -> str:
    """A name for a chart's legend, at most 40 characters. plotly interprets some markup in legends, so markup
    characters are replaced.
    """
    return visible(name).replace("<", "‹").replace(">", "›").replace("&", "+")[:40]
