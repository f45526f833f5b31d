"""summary.json: the results of a run in one table, written at its end."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.config.recipe import config_hash
from reflux.config.registry import kind_of
from reflux.errors import RunError
from reflux.metrics.flops import CHAT, TOKENS
from reflux.metrics.health import Period, periods
from reflux.metrics.history import Row
from reflux.runtime.refreshes import COUNT
from reflux.storage import files

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

_SCORE = ("accuracy", "low", "high", "problems", "split")


def summarise(
    folder: Path, cfg: RunConfig, step: int, totals: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """Write summary.json into a run directory and return it. totals: tokens and FLOP of all steps."""
    evals = list(files.read_lines(folder / "evals.jsonl"))
    table = {
        "recipe": cfg.recipe,
        "method": method_of(cfg),
        "steps": step,
        "seconds": round(seconds, 2),
        **reported(evals),
        "tokens_sampled_total": int(sum(totals[name] for name in TOKENS)),
        **{name: int(totals[name]) for name in TOKENS},
        **({COUNT: int(totals[COUNT])} if COUNT in totals else {}),
        "health": _alarms(files.read_lines(folder / "metrics.jsonl"), evals),
        "flops_total": totals["flops"],
        **chat_totals(totals),
        "commit": commit(),
        "config_hash": config_hash(cfg),
        "seed": cfg.seed,
    }
    files.write_text(folder / "summary.json", json.dumps(table, indent=2) + "\n")
    return table


def _alarms(steps: Iterable[Row], evals: Iterable[Row]) -> dict[str, dict[str, int | None]]:
    """Each alarm that was raised: how often, the first step at which it held, and the last one; None if it
    still held at the end.
    """
    found: dict[str, list[Period]] = {}
    for period in periods(steps, evals):
        found.setdefault(period.name, []).append(period)
    return {
        name: {"times": len(each), "first_step": each[0].first, "last_step": each[-1].last}
        for name, each in found.items()
    }


def chat_totals(totals: Mapping[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """The requests to chat servers, their tokens and costs by role; empty if there were none."""
    found: dict[str, dict[str, float]] = {}
    for key, count in sorted(totals.items()):
        if key.startswith(CHAT):
            role, _, name = key.removeprefix(CHAT).partition(".")
            found.setdefault(role, {})[name] = count
    return {"chat": found} if found else {}


def saved_summary(folder: Path) -> dict[str, Any] | None:
    """The summary that a run wrote at its end; None if it has not ended. Raises RunError if it is damaged."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Remove it; a resumed run writes it again.") from error


def reported(evals: list[dict[str, Any]]) -> dict[str, Any]:
    """The accuracies of a run, each with its split: on test problems, else on those during training."""
    first, last = (dict(next(iter(rows), {})) for rows in (evals[:1], evals[-1:]))
    tests = "test_accuracy" in first or "test_accuracy" in last
    name = "test_accuracy" if tests else "accuracy"
    teacher = first.get("test_accuracy", {}).get("teacher") if tests else first.get("teacher_accuracy")
    return {
        "accuracy_before": _score(first.get(name)),
        "accuracy_after": _score(last.get(name)),
        "teacher_accuracy": _score(teacher),
    }


def method_of(cfg: Any) -> str:
    """The kinds of the parts that make the method: objectives, credit rules, extrapolation."""
    words = [kind_of("objectives", objective) for objective in cfg.objectives]
    words += [kind_of("credit", rule) for rule in cfg.credit.values()]
    words += [kind_of("extrapolation", cfg.extrapolation)] if cfg.extrapolation else []
    return " + ".join(words)


def commit() -> str | None:
    """The commit of the library's checkout, with "+" if files differ. None for an installed package."""
    here, command = Path(__file__).parent, ["git", "describe", "--always", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    known = found.returncode == 0 and "site-packages" not in here.parts
    return found.stdout.strip() or None if known else None


def _score(found: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: found.get(key) for key in _SCORE} if found else None
