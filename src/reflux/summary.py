"""summary.json: the run in one table, written at its end."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux import files
from reflux.accounting import TOKENS
from reflux.config import config_hash

if TYPE_CHECKING:
    from reflux.rundir import Run

_SCORE = ("accuracy", "low", "high", "problems", "split")


def summarise(run: Run) -> dict[str, Any]:
    """Write summary.json and return its content. A run that did nothing new keeps the summary it had."""
    path = run.dir / "summary.json"
    if path.exists() and run.finished:
        return json.loads(path.read_text())
    evals = list(files.read_lines(run.dir / "evals.jsonl"))
    table = {
        "recipe": run.cfg.recipe,
        "method": method_of(run.cfg),
        "steps": run.step,
        "seconds": round(run.seconds, 2),
        **reported(evals),
        "tokens_sampled_total": int(sum(run.totals[name] for name in TOKENS)),
        **{name: int(run.totals[name]) for name in TOKENS},
        "flops_total": run.totals["flops"],
        "commit": commit(),
        "config_hash": config_hash(run.cfg),
        "seed": run.seed,
    }
    files.write_text(path, json.dumps(table, indent=2) + "\n")
    return table


def reported(evals: list[dict[str, Any]]) -> dict[str, Any]:
    """The accuracies of a run: on test problems where it asked them, else those of the evaluations on the way. Each says its split."""
    first, last = (dict(next(iter(rows), {})) for rows in (evals[:1], evals[-1:]))
    tests = "test_accuracy" in first or "test_accuracy" in last
    name = "test_accuracy" if tests else "accuracy"
    teacher = first.get("test_accuracy", {}).get("teacher") if tests else first.get("teacher_accuracy")
    return {"accuracy_before": _score(first.get(name)), "accuracy_after": _score(last.get(name)), "teacher_accuracy": _score(teacher)}


def method_of(cfg: Any) -> str:
    """The parts that make the method, in words: objectives, credit rules, accelerator."""
    from reflux.parts import kind_of

    words = [kind_of("objectives", objective) for objective in cfg.objectives]
    words += [kind_of("credit", rule) for rule in cfg.credit.values()]
    words += [kind_of("accelerators", cfg.accelerator)] if cfg.accelerator else []
    return " + ".join(words)


def commit() -> str | None:
    """The commit of the library's checkout, "+" where files differ from it; None for an installed package."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 and "site-packages" not in here.parts else None


def _score(found: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: found.get(key) for key in _SCORE} if found else None
