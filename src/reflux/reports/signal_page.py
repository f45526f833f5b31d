"""Writes signal.html: how well each signal of a recipe ranks the student's attempts. It reads signal.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reflux.reports.chart import BLUE, GREY, ORANGE, Chart, new_figure
from reflux.reports.curves import plain
from reflux.reports.formatting import visible
from reflux.reports.reading import Row, json_table, number, table, texts
from reflux.reports.rendering import rendered
from reflux.reports.units import NONE, count, percent
from reflux.storage import files

NAME = "signal.json"
HEADER = ("signal", "AUC (95 %)", "at one prompt (95 %)", "pairs", "prompts", "no value")
# the two numbers: key, name in the legend, colour, place beside the middle of the row
_KINDS = (("auc", "AUC over all attempts", BLUE, -0.14), ("pairwise", "pairs at one prompt", ORANGE, 0.14))


def write_signal_page(folder: Path) -> Path:
    """Write signal.html into a folder with signal.json, in one step, and return its path. FileNotFoundError
    if there is no such file.
    """
    found = json_table(folder / NAME, [])
    if found is None:
        raise FileNotFoundError(f"{folder} has no {NAME} that can be read. `reflux signal` writes it.")
    chart = signal_chart(found)
    page = {
        "recipe": visible(str(found.get("recipe"))),
        "lead": lead(found),
        "notes": [visible(note) for note in texts(found.get("notes"))],
        "chart": chart,
        "header": HEADER,
        "signals": [(*map(visible, cells), visible(what)) for cells, what in signal_rows(found)],
        "facts": _facts(found),
    }
    target = folder / "signal.html"
    files.write_text(target, rendered("signal.html", page, [chart]))
    return target


def lead(found: Row) -> str:
    """The sentence on what was measured."""
    judged, right = number(found.get("judged")), number(found.get("right"))
    share = percent(right / judged) if judged and right is not None else NONE
    return (
        f"{count(judged)} attempts at {count(number(found.get('prompts')))} prompts were judged by the "
        f"task's verifier. {share} of them are right. {count(number(found.get('mixed')))} prompts have both "
        "right and wrong attempts."
    )


def signal_rows(found: Row) -> list[tuple[tuple[str, ...], str]]:
    """For each signal the cells of its row, in the order of HEADER, and what it is."""
    rows = []
    for name, entry in table(found.get("signals")).items():
        ranks = table(entry)
        cells = (
            f"{name} (truth)" if ranks.get("truth") else str(name),
            *(_told(ranks, key) for key, *_ in _KINDS),
            *(count(number(ranks.get(key))) for key in ("pairs", "prompts")),
            percent(number(ranks.get("missing"))),
        )
        rows.append((cells, str(ranks.get("what", ""))))
    return rows


def _told(ranks: Row, key: str) -> str:
    """A number with its interval: "0.903 (0.871 to 0.932)"."""
    value, low, high = _ends(ranks, key)
    if value is None:
        return NONE
    return f"{value:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def _ends(ranks: Row, key: str) -> tuple[float | None, float | None, float | None]:
    value, low, high = (number(ranks.get(name)) for name in (key, f"{key}_low", f"{key}_high"))
    return value, low, high


def signal_chart(found: Row) -> Chart:
    """AUC and the share of pairs of each signal, with intervals, and a line at one half."""
    title, signals = "How well each signal ranks attempts", table(found.get("signals"))
    rows = [(plain(str(name)), table(entry)) for name, entry in signals.items()]
    if not any(_ends(ranks, key)[0] is not None for _, ranks in rows for key, *_ in _KINDS):
        return Chart(title, absent="No ranking is defined for these attempts, so there is nothing to draw.")
    places = list(range(len(rows)))
    names = {"tickvals": places, "ticktext": [name for name, _ in rows]}
    half = {"type": "line", "x0": 0.5, "x1": 0.5, "y0": 0, "y1": 1, "yref": "paper", "layer": "between"}
    figure = new_figure(
        "share of pairs that are ranked right",
        "",
        {
            "height": 130 + 46 * len(rows),
            "hovermode": "closest",
            "xaxis_range": [-0.02, 1.02],
            "xaxis_dtick": 0.25,
            "yaxis": {**names, "range": [len(rows) - 0.5, -0.5], "zeroline": False},
            "shapes": [{**half, "line": {"color": GREY, "width": 2}}],
        },
    )
    for key, label, colour, beside in _KINDS:
        _add_intervals(figure, [_ends(ranks, key) for _, ranks in rows], label, colour, beside)
    caption = (
        "A pair is a right and a wrong attempt. The share of pairs in which the right one has the higher "
        "value, over all attempts (AUC) and over attempts at one prompt. Equal values count half. At 0.5 a "
        "signal is no better than chance; below it, the order is reversed. Intervals are 95 %, from "
        "resampled prompts."
    )
    numbers = [(name, _told(ranks, "auc"), _told(ranks, "pairwise")) for name, ranks in rows]
    return Chart(title, figure, caption=caption, header=HEADER[:3], rows=numbers)


def _add_intervals(
    figure: Any,
    ends: list[tuple[float | None, float | None, float | None]],
    label: str,
    colour: str,
    beside: float,
) -> None:
    """Add one point with its interval for each row that has one. beside: the distance from its middle."""
    known = [(place, *each) for place, each in enumerate(ends) if each[0] is not None]
    bars = [
        (value - (value if low is None else low), (value if high is None else high) - value)
        for _, value, low, high in known
        if value is not None
    ]
    figure.add_scatter(
        x=[value for _, value, _, _ in known],
        y=[place + beside for place, *_ in known],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [up for _, up in bars],
            "arrayminus": [down for down, _ in bars],
            "thickness": 2,
            "width": 5,
            "color": colour,
        },
        name=label,
        mode="markers",
        marker={"color": colour, "size": 9},
        hovertemplate="%{x:.3f}",
    )


def _facts(found: Row) -> list[tuple[str, str]]:
    """What is needed to repeat the measurement, and what it cost."""
    facts = [("commit", found.get("commit")), *table(found.get("settings")).items()]
    shown = [(str(name), visible(str(value))) for name, value in facts if value is not None]
    return shown + [(f"requests of role {role}", visible(told)) for role, told in chat_costs(found)]


def chat_costs(found: Row) -> list[tuple[str, str]]:
    """For each role of chat requests what it used, such as "64 requests, 12,345 prompt_tokens"."""
    roles = table(found.get("chat")).items()
    return [
        (str(role), ", ".join(f"{number(value) or 0:,.6g} {name}" for name, value in table(counts).items()))
        for role, counts in roles
    ]
