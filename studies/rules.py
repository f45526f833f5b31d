"""Means over the steps of the notes of margin and balance, in the runs of a study.

This file has no command of its own. studies/table.py adds the table if a run had one of the two rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

Measures = dict[str, float]
# Keys are RULE.NOTE, values are titles.
NOTES = {
    "margin.mixed_fraction": "mixed groups",
    "margin.shifted_fraction": "groups below the margin",
    "margin.margin": "margin, nats",
    "margin.return_correct": "G correct",
    "margin.return_wrong": "G wrong",
    "margin.return_cut": "G cut off",
    "margin.kept": "kept by the mask",
    "balance.kept": "kept by the balance",
}


def noted(steps: list[dict[str, Any]]) -> Measures:
    """For each `rule.RULE.NOTE` the mean over the steps that have it."""
    found: Measures = {}
    for name in NOTES:
        rule, note = name.split(".")
        values = [
            row["credit"][rule][note]
            for row in steps
            if row.get("credit", {}).get(rule, {}).get(note) is not None
        ]
        if values:
            found[f"rule.{name}"] = fmean(values)
    return found


def rules_table(
    table: Mapping[str, Any], grid: Callable[[list[list[str]]], str], cell: Callable[..., str]
) -> str:
    """A table with one row per arm with such a rule. Empty if no arm has one."""
    rows = [
        [arm, *(cell(row["measures"].get(f"rule.{name}"), _three) for name in NOTES)]
        for arm, row in table.items()
    ]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    return (
        f"\nMargin and balance, means over the steps\n\n{grid([['arm', *NOTES.values()], *rows])}\n"
        if rows
        else ""
    )


def _three(value: float) -> str:
    return f"{value:.3f}"
