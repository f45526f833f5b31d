"""The table of a study: the measurements of each arm over its seeds, and the differences to the baseline arm
on the same seeds.

This file has no command of its own. `python studies/run.py STUDY --out OUT` writes the table.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from along import along, course
from intervals import Estimate, over_seeds
from rules import noted, rules_table

from reflux.storage.files import read_lines

Measures = dict[str, float]
Format = Callable[[float], str]
# Keys of an evaluation's table. Keys by part or route, such as accuracy.NAME, are included.
EVALUATED = ("accuracy", "quality", "kl_nats", "avg@", "pass@")
ENDS = (".low", ".high", ".problems", ".attempts")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def decimals(digits: int) -> Format:
    return lambda value: f"{value:.{digits}f}"


COSTS: dict[str, tuple[str, Format]] = {
    "variance_ratio.mean": ("variance ratio", decimals(3)),
    "variance_ratio.first_quarter": ("first quarter", decimals(3)),
    "variance_ratio.last_quarter": ("last quarter", decimals(3)),
    "grad_norm.mean": ("gradient norm", decimals(3)),
    "clipped_share": ("clipped steps", percent),
    "seconds_per_step": ("seconds a step", decimals(3)),
    "learn_share": ("learning's share", percent),
    "peak_memory_bytes": ("peak memory, MB", lambda value: f"{value / 1e6:.0f}"),
    "tokens_sampled": ("tokens sampled, 1000", lambda value: f"{value / 1e3:.0f}"),
}


def measures(run: Path) -> Measures:
    """The numbers of one finished run: evaluations before and after, and the metrics of its steps. Numbers
    that were not measured are absent.
    """
    evals, steps = list(read_lines(run / "evals.jsonl")), list(read_lines(run / "metrics.jsonl"))
    found: Measures = {}
    for when, rows in (
        ("before", [row for row in evals if row["step"] == 0]),
        ("after", [row for row in evals[-1:] if row["step"] > 0]),
    ):
        for name, value in (pair for row in rows for pair in evaluated(row).items()):
            found[f"{name}.{when}"] = value
    ratios = column(steps, "gradient_variance_ratio")
    if ratios:
        quarter = max(1, len(ratios) // 4)
        found["variance_ratio.mean"] = fmean(ratios)
        found["variance_ratio.first_quarter"], found["variance_ratio.last_quarter"] = (
            fmean(ratios[:quarter]),
            fmean(ratios[-quarter:]),
        )
    norms = column(steps, "grad_norm")
    if norms:
        clip = tomllib.loads((run / "config.toml").read_text())["learner"].get("clip")
        found["grad_norm.mean"] = fmean(norms)
        found |= {"clipped_share": fmean(norm > clip for norm in norms)} if clip else {}
    if steps:
        found |= costs(steps) | along(evals, steps) | noted(steps)
    return found


def evaluated(row: Mapping[str, Any]) -> Measures:
    """The main numbers in a line of evals.jsonl, by "EVAL.KEY"."""
    return {
        f"{name}.{key}": float(value)
        for name, table in row.items()
        if isinstance(table, dict)
        for key, value in table.items()
        if key.startswith(EVALUATED) and not key.endswith(ENDS) and isinstance(value, int | float)
    }


def column(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def costs(steps: list[dict[str, Any]]) -> Measures:
    """The costs of a run. Medians leave out the first step, which loads and warms up. The seconds of an
    evaluation are in the total of one step only.
    """
    seconds = [row["seconds"] for row in steps[1:] or steps]
    return {
        "seconds_per_step": median(row["total"] for row in seconds),
        "learn_share": median(row.get("learn", 0.0) / row["total"] for row in seconds if row["total"]),
        "peak_memory_bytes": max(column(steps, "peak_memory_bytes"), default=0.0),
        "tokens_sampled": sum(row["tokens_sampled"] for row in steps),
    }


def compare(runs: Mapping[str, Mapping[int, Measures]], baseline: str) -> dict[str, Any]:
    """For each arm: each measure over seeds, and `minus_baseline`, paired by seed (seeds of both arms
    only).
    """
    table: dict[str, Any] = {}
    for arm, seeds in runs.items():
        names = list(dict.fromkeys(name for found in seeds.values() for name in found))
        paired = sorted(seeds.keys() & runs.get(baseline, {}).keys()) if arm != baseline else []
        others = runs.get(baseline, {})
        table[arm] = {
            "seeds": sorted(seeds),
            "measures": {
                name: over_seeds([found[name] for found in seeds.values() if name in found]) for name in names
            },
            "minus_baseline": {
                name: over_seeds([seeds[s][name] - others[s][name] for s in paired])
                for name in names
                if paired and all(name in seeds[s] and name in others[s] for s in paired)
            },
        }
    return table


def cell(estimate: Estimate | None, shown: Format, signed: bool = False) -> str:
    """A cell such as `88.2 % (86.9 % to 89.5 %)`. One run has no interval. "-" if nothing was measured."""
    if estimate is None:
        return "-"
    plus = "+" if signed and estimate.value > 0 else ""
    ends = (
        ""
        if estimate.low is None or estimate.high is None
        else f" ({shown(estimate.low)} to {shown(estimate.high)})"
    )
    return f"{plus}{shown(estimate.value)}{ends}"


def markdown(table: Mapping[str, Any], baseline: str) -> str:
    """Two tables: the results, and the costs with the noise. Then the course during the runs, if it was
    measured.
    """
    scores = list(
        dict.fromkeys(
            n.rsplit(".", 1)[0]
            for row in table.values()
            for n in row["measures"]
            if n.endswith((".before", ".after"))
        )
    )
    learnt: list[list[str]] = [
        ["arm", "runs"]
        + [title for s in scores for title in (f"{titled(s)} before", "after", f"minus {baseline}")]
    ]
    cost: list[list[str]] = [["arm", *(title for title, _ in COSTS.values())]]
    for arm, row in table.items():
        cells = [arm, str(len(row["seeds"]))]
        for score in scores:
            shown = decimals(3) if "kl_nats" in score else percent
            cells += [cell(row["measures"].get(f"{score}.{when}"), shown) for when in ("before", "after")]
            cells.append(cell(row["minus_baseline"].get(f"{score}.after"), shown, signed=True))
        learnt.append(cells)
        cost.append([arm, *(cell(row["measures"].get(name), shown) for name, (_, shown) in COSTS.items())])
    return f"{grid(learnt)}\n\n{grid(cost)}\n{course(table, grid, cell)}{rules_table(table, grid, cell)}"


def titled(score: str) -> str:
    """The title of a score: `accuracy.accuracy` is accuracy (on validation problems), `agreement.kl_nats` is
    the held-out KL in nats per token.

    The name of a part or route follows the title.
    """
    for name, word in (
        ("accuracy.accuracy", "accuracy"),
        ("test_accuracy.accuracy", "test accuracy"),
        ("agreement.kl_nats", "held-out KL"),
    ):
        if score == name or score.startswith(f"{name}."):
            return word + score.removeprefix(name).replace(".", ", ", 1)
    return score


def grid(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def plain(value: Any) -> Any:
    """The value as JSON reads it back: estimates as tables, tuples as lists."""
    if isinstance(value, Estimate):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
