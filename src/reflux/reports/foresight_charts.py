"""Charts of the spectra of the weight displacement, from evals.jsonl. Runs without these measurements have no
such chart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reflux.reports.chart import BLUE, GREEN, ORANGE, PURPLE, Chart, add_points, new_figure, some
from reflux.reports.reading import Row, number, table, whole

SHARES = {
    "rho": ("rho: the first direction's share", BLUE),
    "top_norm_ratio": ("top-norm ratio: the first directions' share", GREEN),
}
SIZES = {
    "spectral_norm": ("Spectral norm by step", ORANGE),
    "effective_rank": ("Effective rank by step", PURPLE),
}
HELP = {
    "spectral_norm": (
        "The largest singular value of a matrix's displacement since the start of training, mean over "
        "attention and MLP matrices."
    ),
    "effective_rank": (
        "The effective number of directions of the displacement: the exponential of the entropy of its "
        "singular values."
    ),
}


@dataclass(frozen=True)
class Spectrum:
    """The spectrum at one evaluation: means over matrices, and the alignment of earlier evaluations with this
    one, by step.
    """

    step: int
    values: dict[str, float]
    alignment: dict[int, float]


def read_spectra(lines: Iterable[Row]) -> list[Spectrum]:
    """The spectra in order of step. Evaluations without spectra, and those without a displacement, are left
    out.
    """
    found = []
    for row in lines:
        step = whole(row.get("step"))
        for entry in map(table, row.values()):
            values = {
                name: value for name in (*SIZES, *SHARES) if (value := number(entry.get(name))) is not None
            }
            if step is not None and values:
                found.append(Spectrum(step, values, _alignment(entry)))
    return sorted(found, key=lambda spectrum: spectrum.step)


def _alignment(entry: Row) -> dict[int, float]:
    pairs = ((step, number(value)) for step, value in table(entry.get("alignment")).items())
    return {int(step): value for step, value in pairs if value is not None and step.isdigit()}


def foresight_charts(spectra: list[Spectrum]) -> list[Chart]:
    """Charts of norm, rank, shares and alignment by step. Empty if no spectrum was measured."""
    if not spectra:
        return []
    return [*(_size(spectra, name) for name in SIZES), _shares(spectra)]


def _size(spectra: list[Spectrum], name: str) -> Chart:
    title, colour = SIZES[name]
    unit = title.removesuffix(" by step").lower()
    figure = new_figure("step", unit, {"yaxis_rangemode": "tozero"})
    points = [(spectrum.step, spectrum.values[name]) for spectrum in spectra if name in spectrum.values]
    add_points(figure, points, unit, colour, "%{y:.4g}")
    return Chart(
        title,
        figure,
        caption=HELP[name],
        header=("step", unit),
        rows=some([(f"{s}", f"{v:.4g}") for s, v in points]),
    )


def _shares(spectra: list[Spectrum]) -> Chart:
    """rho, top-norm ratio, and alignment of each step with the last one: all between 0 and 1."""
    figure = new_figure("step", "share", {"yaxis_range": [0, 1.05], "yaxis_tickformat": ".0%"})
    lines = {
        title: (
            colour,
            [(spectrum.step, spectrum.values[name]) for spectrum in spectra if name in spectrum.values],
        )
        for name, (title, colour) in SHARES.items()
    }
    lines[f"alignment with step {spectra[-1].step}"] = (ORANGE, sorted(spectra[-1].alignment.items()))
    numbers: list[tuple[str, ...]] = []
    for title, (colour, points) in lines.items():
        if points:
            add_points(figure, points, title, colour, "%{y:.1%}")
            numbers += some([(title, f"{step}", f"{100 * value:.1f} %") for step, value in points])
    caption = (
        "The share of the displacement's length in its first singular directions, and the alignment of the "
        "directions at earlier steps with those at the last step."
    )
    return Chart(
        "Directions of the displacement by step",
        figure,
        caption=caption,
        header=("", "step", "share"),
        rows=numbers,
    )
