"""reflux plan, list, cite and report."""

from __future__ import annotations

import inspect
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reflux.config import registry
from reflux.config.bases import RECIPES, recipe_names
from reflux.config.citations import papers
from reflux.config.discovery import parts_of
from reflux.config.recipe import load_recipe
from reflux.errors import ConfigError, RunError
from reflux.inspection.plan import Plan, Size, plan
from reflux.inspection.working_memory import WorkingMemory

console = Console()
_MORE = (
    "  What each computes: docs/methods.md. Its settings: docs/configuration.md. Which to choose: "
    "docs/recipes.md."
)


def show_plan(recipe: str, overrides: list[str]) -> None:
    found = plan(load_recipe(recipe, overrides))
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("recipe", f"{found.recipe} ({found.method}), config {found.config_hash}"),
        ("student", _size(found.student)),
        *((f"teacher {name}", _size(size)) for name, size in found.teachers.items()),
        ("steps", f"{found.steps} of {found.attempts_per_step} attempts"),
        ("lengths", lengths_in_words(found)),
        ("memory", _memory(found.memory_bytes, found.position)),
        *((f"  working, {each.device}", _working(each)) for each in found.working),
        *([("  server", found.server_memory)] if found.server_memory else []),
        *((f"cluster, {name}", text) for name, text in found.cluster),
        ("sampled", f"at most {found.positions_at_most:,} {found.position}s"),
        ("compute", _compute(found)),
        ("also computed", "; ".join(found.requirements) or "nothing beyond the loss"),
    ]
    for name, text in rows:
        table.add_row(name, text)
    console.print(table, markup=False, highlight=False)
    for warning in found.warnings:
        console.print(f"note: {warning}", style="yellow", markup=False)
    console.print("All parts fit together. No weight was loaded.", style="green")


def _size(size: Size) -> str:
    if size.parameters is None:
        return f"{size.name} ({size.architecture})"
    reads = (
        f"{size.patches or '?'} patches an image"
        if size.architecture.endswith("2DModel")
        else f"context {size.context_tokens or '?'}"
    )
    return f"{size.name} ({size.architecture}, {size.parameters / 1e6:,.2f} M parameters, {reads})"


def lengths_in_words(found: Plan) -> str:
    """The length limits of one attempt in training and in evaluations, as a text."""
    least, most = found.training_positions
    training = f"at most {most:,} {found.position}s in training" + (
        f" (lowest limit {least:,})" if least < most else ""
    )
    images = found.position != "token"
    return training + (
        "; evaluations run all denoising steps"
        if images
        else f", {found.evaluation_positions:,} in evaluations"
    )


def _compute(found: Plan) -> str:
    if not found.flops_at_most:
        return "unknown until the models are here"
    return f"at most {found.flops_at_most:.3g} FLOP" + (
        ", prompts not counted" if found.position == "token" else ""
    )


def _memory(count: int | None, position: str) -> str:
    if count is None:
        return "unknown until the models are here"
    return (
        f"{_bytes(count)} for weights and optimiser, without activations"
        f"{' and key-value cache' if position == 'token' else ''}"
    )


def _working(memory: WorkingMemory) -> str:
    return (
        f"at most about {_bytes(memory.peak)} more: activations of a micro-batch "
        f"{_bytes(memory.activations)}, tables of the loss {_bytes(memory.loss)}"
        + (f"; while sampling a key-value cache of {_bytes(memory.cache)}" if memory.cache else "")
    )


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count > 1e8 else f"{count / 1e6:.1f} MB"


def list_parts(group: str, module: str = "") -> None:
    """Print one line per recipe or part: the first line of the recipe's file or of the part's docstring.
    group: which ones, such as "recipes" or "teachers"; "" lists all. module: list the parts that this package
    defines, instead of the shipped parts.

    Raises ConfigError for an unknown group, and for a module that cannot be imported or defines no part.
    """
    known = ["recipes", *registry.GROUPS]
    if group and group not in known:
        raise ConfigError(
            f"there is no group '{group}'{registry.did_you_mean(group, known, '.')} Groups: "
            f"{', '.join(known)}"
        )
    shown = (
        _lines_of(module)
        if module
        else {name: recipe_lines() if name == "recipes" else part_lines(name) for name in known}
    )
    for name in [group] if group else shown:
        lines = shown.get(name, {})
        console.print(name if lines else f"{name}: none yet", style="bold")
        for kind, line in lines.items():
            console.print(f"  {kind:18} {line}", markup=False, highlight=False, soft_wrap=True)
        if name == "objectives" and not module:
            console.print(_MORE, style="dim", soft_wrap=True)


def _lines_of(module: str) -> dict[str, dict[str, str]]:
    found = {
        group: {kind: _first_line(cls) for kind, cls in classes.items()}
        for group, classes in parts_of(module).items()
    }
    if not found:
        raise ConfigError(
            f"'{module}' defines no part. A part is a frozen dataclass that inherits the base class of its "
            "group (docs/extending.md)."
        )
    return found


def recipe_lines() -> dict[str, str]:
    return {
        name: (RECIPES / f"{name}.toml").read_text().split("\n")[0].removeprefix("# ")
        for name in recipe_names()
    }


def part_lines(group: str) -> dict[str, str]:
    return {kind: _first_line(registry.part(group, kind)) for kind in sorted(registry.kinds(group))}


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n")[0]


def show_citations(recipe: str, overrides: list[str]) -> None:
    found = papers(load_recipe(recipe, overrides))
    console.print("\n\n".join(paper.bibtex for paper in found), markup=False, highlight=False, soft_wrap=True)


def write_report(run: Path) -> None:
    if not (run / "config.toml").exists():
        raise RunError(f"{run} is not a run directory: it has no config.toml")
    from reflux.reports import page

    console.print(f"{page.write_report(run)}", markup=False, highlight=False)
