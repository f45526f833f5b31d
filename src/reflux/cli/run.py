"""reflux run: show live progress, and at the end the results."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from reflux.cli.progress import Progress
from reflux.config.recipe import RunConfig, load_recipe, saved_table
from reflux.errors import RunError, StepRefused, Stopped, StoppedByAlarm
from reflux.models.locations import SHIPPED
from reflux.reports.asked import problems_of, split_of
from reflux.runtime.library_logging import quiet_libraries
from reflux.storage import recipe_paths
from reflux.storage.files import read_lines
from reflux.storage.run_dir import check_place, choose_folder
from reflux.training import Options
from reflux.types import FlowRollout

console = Console()


def run_recipe(recipe: str, overrides: list[str], out: Path | None, resume: bool) -> None:
    """Train as `reflux run` does, then print the results. recipe: a name or a path. out: the run directory.
    resume: continue an earlier run. After a stop by the user the exit code is 130, as shells expect; after
    a stop by an alarm it is 3.
    """
    cfg = load_recipe(recipe, overrides)
    if cfg.learner.follow():
        # Another process shows the run.
        return
    folder = choose_folder(cfg.recipe, out, resume)
    check_place(folder)
    if resume and (folder / "config.toml").is_file():
        cfg = recipe_paths.continued(cfg, saved_table(folder))
    from reflux import checks

    checks.join(cfg)
    for warning in checks.warnings(cfg):
        console.print(f"note: {warning}", style="yellow", markup=False)
    console.print(f"{cfg.recipe} -> {folder}", style="bold", markup=False, highlight=False)
    again = shlex.join(["reflux", "run", recipe, *overrides, "--out", str(folder), "--resume"])
    try:
        summary = _train(cfg, Options(folder, resume), console)
    except StoppedByAlarm as stopped:
        from reflux.reports.page import write_report

        _say(
            f"{stopped}\nReport: {write_report(folder)}\n"
            f"This alarm does not stop the run again while it holds. Continue with:\n  {again}"
        )
        raise SystemExit(3) from None
    except Stopped as stopped:
        _say(f"{stopped}. Continue with:\n  {again}")
        raise SystemExit(130) from None
    except RunError:
        raise
    except (StepRefused, OSError):
        if (folder / "checkpoints").is_dir():
            _say(f"The last checkpoint is kept. When the cause below is fixed, continue with:\n  {again}")
        raise
    _finish(folder, cfg, recipe, summary)


def _train(cfg: RunConfig, options: Options, console: Console) -> dict[str, Any]:
    with Progress(console, cfg) as progress:
        # importing torch and transformers takes seconds, so the first line is shown before
        from reflux.loop import train

        quiet_libraries()
        return asyncio.run(train(cfg, Options(options.out, options.resume, progress)))


def _finish(folder: Path, cfg: RunConfig, recipe: str, summary: dict[str, Any]) -> None:
    from reflux.reports.page import write_report
    from reflux.reports.tables import before_after

    console.print(before_after(summary))
    _show_problem(folder)
    page = write_report(folder)
    _say(f"\nRun directory  {folder}\nReport         {page}\nStudent        {folder / 'student'}")
    console.print("\nNext:", style="bold")
    lines = _next(folder, cfg, shlex.quote(recipe))
    width = max(len(command) for command, _ in lines)
    for command, what in lines:
        _say(f"  {command:{width}}   {what}")


def _say(text: str) -> None:
    """Print plain text without wrapping, so that paths and commands can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _next(folder: Path, cfg: RunConfig, recipe: str) -> list[tuple[str, str]]:
    """Commands to try next, each with a description. Other recipes and scales are proposed after runs of the
    embedded models only, because the proposed commands name no other models.
    """
    flow, place = cfg.learner.rollouts is FlowRollout, shlex.quote(str(folder))
    noisy = "accuracy, also of noisy samples" if flow else "accuracy, also of sampled answers"
    evaluate = (f"reflux eval {place} --samples 8", noisy)
    if not cfg.learner.model.startswith(SHIPPED):
        return [evaluate, ("reflux list recipes", "other methods")]
    methods, base, scale = (
        (("flow_grpo", "flow"), "sd3", "Stable Diffusion 3.5")
        if flow
        else (("vopd", "gkd"), "hub", "Hugging Face models")
    )
    other = next(name for name in methods if name != cfg.recipe)
    return [
        evaluate,
        (f"reflux run {other}", "another method on the same models (all: reflux list recipes)"),
        (f"reflux plan {recipe} base={base}", f"the same method on {scale}"),
    ]


def _show_problem(folder: Path) -> None:
    """Print one problem that the student has learnt to solve, with its answers before and after
    training. Model text is printed unchanged and never as markup.
    """
    rows = [row["accuracy"] for row in read_lines(folder / "evals.jsonl") if "accuracy" in row]
    if len(rows) < 2:
        return
    pairs = list(zip(rows[0].get("examples", []), rows[-1].get("examples", []), strict=False))
    learnt = [pair for pair in pairs if not pair[0]["verdict"] and pair[1]["verdict"]]
    if not pairs:
        return
    before, after = (learnt or pairs)[0]
    console.print(f"\nOne {problems_of([split_of(rows[-1].get('split'))], 'problem')}", style="bold")
    drawn = "image" in before
    shown = (
        [("before", _side_by_side(before, after))]
        if drawn
        else [("before", before["text"]), ("after", after["text"])]
    )
    for title, text in (("problem", before["prompt"]), *shown, ("answer", before["answer"])):
        _say(f"  {title:8} {text}")


def _side_by_side(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Two images as text, side by side, with " after " between them on the first line."""
    from reflux.models.images import as_letters, from_text

    left, right = (as_letters(from_text(example["image"])) for example in (before, after))
    words = [" after " if row == 0 else " " * 7 for row in range(len(left))]
    return ("\n" + " " * 11).join(f"{a} {b} {c}" for a, b, c in zip(left, words, right, strict=True))
