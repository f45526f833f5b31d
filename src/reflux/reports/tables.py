"""The table of accuracies at the end of a run, for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from reflux.reports.scores import before_after_teacher

_HEADER = ("", "accuracy", "95 % interval", "problems")
_UNKNOWN = ("not measured", "", "")


def before_after(summary: dict[str, Any]) -> Table:
    """The accuracies before and after training and of the teacher, with intervals. An accuracy that the run
    did not measure is shown as "not measured".
    """
    table = Table(*_HEADER)
    for column in table.columns[1:]:
        column.justify = "right"
    for cells in _rows(summary):
        table.add_row(*cells)
    return table


def before_after_text(summary: dict[str, Any]) -> str:
    """The same table in plain text, for a log file or a pipe."""
    lines = [_HEADER, *_rows(summary)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(_HEADER))]
    return "\n".join(_line(line, widths) for line in lines)


def _rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (label, *(_UNKNOWN if score is None else score.cells))
        for label, score in before_after_teacher(summary)
    ]


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = cells
    return "  ".join(
        [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
    ).rstrip()
