"""The course of a study: the results of evaluations during the runs, with the FLOP spent until then. The FLOP
include those of searches.

This file has no command of its own. studies/table.py adds the course if runs were evaluated before their end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from intervals import Estimate

Measures = dict[str, float]
AT = "@step "
# Keys of an evaluation's table, each with its title and True if it is a share.
DRAWN = {
    "accuracy.accuracy": ("Accuracy by step", True),
    "flops": ("TFLOP spent by step", False),
    "foresight.spectral_norm": ("Spectral norm by step", False),
    "foresight.rho": ("rho by step", True),
    "foresight.effective_rank": ("Effective rank by step", False),
    "foresight.top_norm_ratio": ("Top-norm ratio by step", True),
    "foresight.alignment": ("Alignment with the last step", True),
}


def along(evals: list[dict[str, Any]], steps: list[dict[str, Any]]) -> Measures:
    """`NAME@step N` for the keys of DRAWN, at every evaluation after the start. Empty if the only such
    evaluation is the one at the end.
    """
    rows = [row for row in evals if row["step"] > 0]
    found: Measures = {}
    for row in rows if len(rows) > 1 else ():
        at = f"{AT}{row['step']}"
        spent = [
            sum(line["flops"].values()) for line in steps if line["step"] <= row["step"] and "flops" in line
        ]
        values = {
            "flops": sum(spent) / 1e12 if spent else None,
            "foresight.alignment": _aligned(rows[-1], row["step"]),
        }
        for name in DRAWN.keys() - values.keys():
            evaluation, key = name.split(".")
            values[name] = (row.get(evaluation) or {}).get(key)
        found |= {f"{name}{at}": value for name, value in values.items() if value is not None}
    return found


def _aligned(last: dict[str, Any], step: int) -> float | None:
    return ((last.get("foresight") or {}).get("alignment") or {}).get(str(step))


def course(table: Mapping[str, Any], grid: Callable[[list[list[str]]], str], cell: Callable[..., str]) -> str:
    """A table for each key of DRAWN that was measured, with one row per arm and one column per step."""
    parts = []
    for name, (title, share) in DRAWN.items():
        steps = sorted(
            {
                int(key.split(AT)[1])
                for row in table.values()
                for key in row["measures"]
                if key.startswith(name + AT)
            }
        )
        if steps:
            rows = [["arm", *(f"step {step}" for step in steps)]]
            shown = _percent if share else _three
            rows += [
                [arm, *(cell(_estimate(row, f"{name}{AT}{step}"), shown) for step in steps)]
                for arm, row in table.items()
            ]
            parts.append(f"\n{title}\n\n{grid(rows)}\n")
    return "".join(parts)


def _estimate(row: Mapping[str, Any], name: str) -> Estimate | None:
    return row["measures"].get(name)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _three(value: float) -> str:
    return f"{value:.3g}"
