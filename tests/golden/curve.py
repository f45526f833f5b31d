"""The golden curve: the first steps of the quickstart's shape, small enough for a test. Written again by
`make golden`.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("quickstart.json")
RECIPES = ("quickstart", "vopd", "topk", "rl_opd")
KEPT = ("step", "loss", "kl_nats", "kl_nats_trained", "grad_norm", "tokens_sampled")
SMALL = {"steps": 3, "prompts_per_step": 8, "threads": 1, "evals": "none", "learner.lr": 1e-3}


def curve(recipe: str, out: Path, **more: Any) -> list[dict[str, Any]]:
    """The metrics of a small run that do not depend on the machine's speed. more: further settings."""
    from reflux.config.recipe import load_recipe
    from reflux.loop import train
    from reflux.training import Options

    asyncio.run(train(load_recipe(recipe, SMALL | more), Options(out)))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in KEPT if name in row} for row in rows]
