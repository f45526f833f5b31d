"""reflux eval: one model, one task."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from reflux.config import RunConfig, from_table, merge, nest, split_override, unpack
from reflux.evals.accuracy import Accuracy
from reflux.models import load_tokenizer
from reflux.rundir import Options, Run
from reflux.types import Wants

console = Console()


def evaluate_model(model: str, task: str, problems: int, samples: int, max_tokens: int, overrides: list[str]) -> None:
    """Print the table of `accuracy`; nothing is written."""
    table: dict[str, Any] = {
        "steps": 0,
        "task": {"kind": task},
        "sampler": {"max_tokens": max_tokens},
        "learner": {"model": model},
        "objectives": [{"kind": "nll"}],
    }
    for path, value in map(split_override, overrides):
        table = merge(table, nest(path.split("."), unpack(value), table))
    from reflux.quiet import quiet_libraries

    quiet_libraries()
    load_tokenizer(model, "MODEL")
    found = asyncio.run(_accuracy(from_table(table), Accuracy(problems=problems, samples=samples, max_tokens=max_tokens, examples=0)))
    for name, value in found.items():
        if name != "examples":
            console.print(f"{name:16} {_shown(value)}", markup=False, highlight=False)


async def _accuracy(cfg: RunConfig, asked: Accuracy) -> dict[str, Any]:
    from reflux.teachers.base import Teachers

    with tempfile.TemporaryDirectory() as scratch:
        run = Run.open(cfg, Wants(), Options(Path(scratch) / "eval"))
        try:
            async with cfg.sampler.open(run) as sampler:
                return await asked(run, sampler, Teachers({}))
        finally:
            run.close()


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
