"""The costs of a run: seconds and FLOPs by role, tokens, memory, staleness."""

from __future__ import annotations

from reflux.reports.chart import BLUE, GREEN, ROLE_COLOURS, Chart, add_line, new_figure, some
from reflux.reports.metrics import ROLES, Column, Metrics, known, rest_of, thinned, total
from reflux.reports.units import NONE, count, duration, percent, scaled
from reflux.reports.words import TEXTS, Words


def seconds_chart(metrics: Metrics) -> Chart:
    """Seconds of each step by role, stacked. "rest" is the time that no role accounts for."""
    columns = {role: metrics.seconds[role] for role in ROLES} | {"rest": rest_of(metrics.seconds)}
    chart = _stacked(
        "Seconds per step, by role", "seconds per step", columns, metrics.step, "%{y:.3f} s", ".3f", "~g"
    )
    if columns["rest"] and any(known(columns["rest"])):
        chart.caption = "Rest is the time that no role accounts for, such as evaluations and writing files."
    return chart


def flops_chart(metrics: Metrics) -> Chart:
    """Floating-point operations of each step by role, stacked."""
    return _stacked(
        "FLOPs per step, by role",
        "FLOPs per step",
        dict(metrics.flops),
        metrics.step,
        "%{y:.3s}FLOP",
        ".3g",
        "~s",
    )


def _stacked(
    title: str, unit: str, columns: dict[str, Column], step: list[int], hover: str, digits: str, ticks: str
) -> Chart:
    used = {role: column for role, column in columns.items() if any(known(column))}
    if not used:
        return Chart(title, absent=f"metrics.jsonl holds no {unit} yet.")
    figure = new_figure("step", unit, {"yaxis_rangemode": "tozero", "yaxis_tickformat": ticks})
    numbers: list[tuple[str, ...]] = []
    for role, column in used.items():
        steps, values = thinned(step, [0.0 if value is None else value for value in column])
        add_line(figure, steps, values, role, ROLE_COLOURS[role], hover)
        figure.data[-1].update(stackgroup="all", line={"width": 0.5, "color": ROLE_COLOURS[role]})
        numbers += some(
            [(role, f"{at:.0f}", f"{value:{digits}}") for at, value in zip(steps, values, strict=True)], 10
        )
    return Chart(title, figure, header=("role", "step", unit), rows=numbers)


def tokens_chart(metrics: Metrics, words: Words = TEXTS) -> Chart:
    """The numbers of tokens (or denoising steps) sampled and trained on, by optimiser step."""
    title = f"{words.units.capitalize()} {'by optimiser step' if words.images else 'per step'}"
    figure = new_figure("step", title.lower(), {"yaxis_rangemode": "tozero", "yaxis_tickformat": "~s"})
    numbers: list[tuple[str, ...]] = []
    for name, column, colour in (
        ("sampled", metrics.tokens_sampled, BLUE),
        ("trained on", metrics.tokens_trained, GREEN),
    ):
        steps, values = thinned(metrics.step, column)
        if steps:
            add_line(figure, steps, values, name, colour, "%{y:,.0f}")
            numbers += some(
                [(name, f"{at:.0f}", count(value)) for at, value in zip(steps, values, strict=True)], 10
            )
    if not numbers:
        return Chart(title, absent=f"metrics.jsonl holds no {words.unit} counts yet.")
    return Chart(title, figure, header=("", "step", words.units), rows=numbers)


def roles_table(metrics: Metrics) -> list[tuple[str, str, str, str, str]]:
    """Rows of (role, seconds, share of all seconds, FLOPs, share of all FLOPs), the total last.

    Empty if metrics.jsonl has no step.
    """
    if not metrics.step:
        return []
    seconds = {role: total(metrics.seconds[role]) for role in ROLES} | {
        "rest": total(rest_of(metrics.seconds))
    }
    flops = {role: total(metrics.flops[role]) for role in ROLES} | {"rest": None}
    all_seconds, all_flops = _sum(seconds), _sum(flops)
    lines = [(role, seconds[role], flops[role]) for role in seconds if seconds[role] or flops[role]]
    return [
        (role, duration(spent), _share(spent, all_seconds), scaled(flop, "FLOP"), _share(flop, all_flops))
        for role, spent, flop in [*lines, ("total", all_seconds, all_flops)]
    ]


def other_costs(metrics: Metrics, words: Words = TEXTS) -> list[tuple[str, str]]:
    """Pairs (name, amount) of positions, memory and staleness. Unknown ones are left out."""
    sampled, trained = total(metrics.tokens_sampled), total(metrics.tokens_trained)
    seconds, stalenesses = total(metrics.seconds["total"]), known(metrics.staleness_mean)
    found = [
        (f"{words.units} sampled", count(sampled)),
        (f"{words.units} sampled to score weights", count(total(metrics.tokens_scored))),
        (
            f"{words.units} sampled and discarded after an extrapolation",
            count(total(metrics.tokens_discarded) or None),
        ),
        (f"{words.units} trained on", count(trained)),
        (f"{words.units} sampled per second", count(sampled / seconds) if sampled and seconds else NONE),
        ("peak memory", scaled(max(known(metrics.peak_memory_bytes), default=None), "B")),
        ("staleness, mean", f"{sum(stalenesses) / len(stalenesses):.2f} steps" if stalenesses else NONE),
        ("attempts that could not be graded", count(total(metrics.ungraded) or None)),
        (
            "staleness, largest",
            f"{max(known(metrics.staleness_max)):.0f} steps" if known(metrics.staleness_max) else NONE,
        ),
    ]
    return [entry for entry in found if entry[1] != NONE]


def _sum(parts: dict[str, float | None]) -> float | None:
    values = known(list(parts.values()))
    return sum(values) if values else None


def _share(part: float | None, whole: float | None) -> str:
    return NONE if part is None or not whole else percent(part / whole, 0)
