"""Reflux: on-policy distillation in one loop. `reflux.run("quickstart")` trains; every published method is a
combination of parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def run(
    recipe: str | Path,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run a recipe (a shipped name or a TOML file) with overrides, and return its summary: the content of
    summary.json.

    >>> import reflux
    >>> reflux.run("opd", {"base": "hub", "learner.model": "Qwen/Qwen3-0.6B", "teachers.main.model": "Qwen/Qwen3-8B"})  # doctest: +SKIP

    out: the run directory (default runs/<recipe>, numbered where taken). Raises ConfigError before any weight
    is loaded. Inside a running event loop (a notebook) await `train` of `reflux.loop` instead, as README.md
    shows.
    """
    import asyncio

    from reflux.config.recipe import load_recipe
    from reflux.loop import train
    from reflux.storage.run_dir import choose_folder
    from reflux.training import Options

    cfg = load_recipe(recipe, overrides)
    return asyncio.run(train(cfg, Options(choose_folder(cfg.recipe, out, resume), resume)))
