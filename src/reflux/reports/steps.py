"""Charts of numbers that only some runs record at each step: the variance ratio of a baseline, and the share
of ratios outside their bound.
"""

from __future__ import annotations

from reflux.reports.chart import BLUE, GREY, Chart, add_line, new_figure, some
from reflux.reports.metrics import Column, Metrics, known, thinned


def variance_chart(metrics: Metrics) -> Chart | None:
    """The variance of the gradient with the baseline divided by the variance without it, by step. None if it
    was not logged (`log_variance`).
    """
    column = metrics.gradient_variance_ratio
    if not known(column):
        return None
    caption = (
        "Variance of the sampled gradient with the baseline divided by the variance without it, on the "
        "attempts of each step: below 1 the baseline helps."
    )
    chart = _line("Variance ratio by step", "with baseline / without", metrics, column, "%{y:.3f}", ".3f")
    chart.caption = caption + chart.caption
    assert chart.figure is not None
    chart.figure.update_yaxes(rangemode="tozero")
    chart.figure.add_hline(y=1, line={"dash": "dash", "color": GREY, "width": 1})
    return chart


def outside_chart(metrics: Metrics) -> Chart | None:
    """The share of positions whose importance ratio is outside its bound, by step. None if there never was
    one.
    """
    column = metrics.ratio_outside_share
    if not any(value > 0 for value in known(column)):
        return None
    chart = _line(
        "Ratios outside their bound by step", "share of positions", metrics, column, "%{y:.2%}", ".2%"
    )
    caption = (
        "Share of positions where the ratio of student and sampler is outside its bound. The correction for "
        "staleness may be incomplete at these positions."
    )
    chart.caption = caption + chart.caption
    assert chart.figure is not None
    chart.figure.update_yaxes(rangemode="tozero", tickformat="~%")
    return chart


def _line(title: str, unit: str, metrics: Metrics, column: Column, hover: str, digits: str) -> Chart:
    steps, values = thinned(metrics.step, column)
    figure = new_figure("step", unit, {})
    add_line(figure, steps, values, unit, BLUE, hover)
    caption = " Each point is the mean of several steps." if len(known(column)) > len(steps) else ""
    numbers = some([(f"{at:.0f}", f"{value:{digits}}") for at, value in zip(steps, values, strict=True)])
    return Chart(title, figure, caption=caption, header=("step", unit), rows=numbers)
