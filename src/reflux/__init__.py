"""Reflux: on-policy distillation in one training loop. `reflux.run("quickstart")` trains a student. A method
is a combination of parts, which a recipe names.
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
    """Run a recipe (the name of a shipped recipe or a TOML file) with overrides. Returns the content of
    summary.json.

    >>> import reflux
    >>> models = {"learner.model": "Qwen/Qwen3-0.6B", "teachers.main.model": "Qwen/Qwen3-8B"}
    >>> reflux.run("opd", {"base": "hub", **models})  # doctest: +SKIP

    out: the run directory. The default is runs/<recipe>, with a number added if it exists. Raises ConfigError
    before any weight is loaded if the recipe is invalid. Inside a running event loop, such as a notebook,
    await `reflux.loop.train` instead; README.md shows how.
    """
    import asyncio

    from reflux.config.recipe import load_recipe
    from reflux.loop import train
    from reflux.storage.run_dir import choose_folder
    from reflux.training import Options

    cfg = load_recipe(recipe, overrides)
    return asyncio.run(train(cfg, Options(choose_folder(cfg.recipe, out, resume), resume)))
