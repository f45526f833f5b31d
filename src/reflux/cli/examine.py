"""reflux doctor: print each finding as it is made, and set the exit code."""

from __future__ import annotations

import asyncio

from rich.console import Console

from reflux.config.recipe import load_recipe

console = Console()
_STYLE = {"ok": "green", "warning": "yellow", "failed": "red"}


def show_findings(recipe: str, overrides: list[str]) -> None:
    """Print the findings of `reflux doctor`. The exit code is 1 if a check failed."""
    cfg = load_recipe(recipe, overrides)
    from reflux.inspection.doctor import examine
    from reflux.runtime.library_logging import quiet_libraries

    quiet_libraries()

    async def show() -> bool:
        failed = False
        async for finding in examine(cfg):
            console.print(f"{finding.verdict:8}", style=_STYLE[finding.verdict], end="")
            console.print(f"{finding.check}: {finding.text}", markup=False, highlight=False, soft_wrap=True)
            failed |= finding.verdict == "failed"
        return failed

    if asyncio.run(show()):
        raise SystemExit(1)
