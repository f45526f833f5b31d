"""reflux difficulty: measure how hard the training prompts are for a recipe's student, and write
a prompt file that is balanced by difficulty.

Uni-OPD samples with temperature 1, top-p 0.95 and top-k 50. The samplers here have no top-k, so it
is left out. Images have neither temperature nor top-p: they are sampled with the noisy steps of training.
"""

from __future__ import annotations

import asyncio
import shlex
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reflux import checks
from reflux.config.recipe import RunConfig, Track, config_hash, load_recipe, part_context, to_toml
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.errors import DataError, RunError
from reflux.evals.evaluation import Evaluation
from reflux.evals.problems import problems
from reflux.evals.prompt_difficulty import (
    FIRST,
    Counted,
    as_line,
    copies_of,
    measured,
    repeated,
    training_prompts,
)
from reflux.runtime.services import Services
from reflux.storage.files import append_lines, write_lines, write_text
from reflux.storage.partial_results import taken_up
from reflux.storage.run_dir import check_place, make
from reflux.tasks.base import Split, Task
from reflux.tasks.jsonl import Jsonl
from reflux.types import FlowRollout, Prompt

console = Console()
PARTIAL = "difficulty.partial.jsonl"
NOTE: dict[str, Any] = {"style": "yellow", "markup": False, "highlight": False, "soft_wrap": True}


def balance_prompts(
    recipe: str,
    overrides: list[str],
    samples: int,
    prompts: int,
    sampling: tuple[float, float],
    cap: int,
    out: Path | None,
) -> None:
    """Sample answers, count the correct ones, write `difficulty.jsonl`, `prompts.jsonl` and
    `recipe.toml`, and print the difficulties before and after balancing (see `multiplicities`).

    recipe.toml is the whole recipe, overrides included, with the task `jsonl` on prompts.jsonl.
    validation.jsonl and test.jsonl hold the held-out prompts of the recipe's own task, for recipe.toml.

    samples: answers per prompt. prompts: the number of prompts; 0: all of one pass. sampling: temperature and
    top-p. cap: the largest number of copies of a prompt. out: the output folder. Counts are written as they
    come, so a call that was killed can be continued. The other files are written completely or not at all.
    Raises RunError for a folder that holds finished counts, or counts made with other settings.
    """
    whole = load_recipe(recipe, overrides)
    # only the sampler is needed
    cfg = replace(whole, teachers={}, credit={}, evals={}, rewards={}, extrapolation=None, track=Track())
    folder = out or Path("runs") / f"{cfg.recipe}-difficulty"
    check_place(folder)
    if (folder / "difficulty.jsonl").exists() and not (folder / PARTIAL).exists():
        raise RunError(f"{folder} already contains counts. Choose another folder with --out.")
    asked, cut = training_prompts(cfg.task, cfg.seed, prompts)
    if not asked:
        raise DataError("the task has no training prompts, so there is nothing to balance")
    checks.inputs(cfg)
    if cut and not prompts:
        console.print(
            f"note: this task has no end, so its first {FIRST} training prompts are used (--prompts N "
            "for more)",
            style="yellow",
        )
    from reflux.runtime.library_logging import quiet_libraries

    quiet_libraries()
    make(folder)
    said = {
        "samples": samples,
        "temperature": sampling[0],
        "top_p": sampling[1],
        "prompts": len(asked),
        "config_hash": config_hash(cfg),
    }
    known = {row["id"]: row for row in taken_up(folder / PARTIAL, said, "counts")}
    counted = asyncio.run(_count(cfg, asked, known, samples, sampling, folder / PARTIAL))
    copies = copies_of(counted, cap)
    write_lines(
        folder / "difficulty.jsonl", [entry.line(times) for entry, times in zip(counted, copies, strict=True)]
    )
    write_lines(folder / "prompts.jsonl", [as_line(prompt) for prompt in repeated(asked, copies)])
    write_text(folder / "recipe.toml", to_toml(replace(whole, task=_balanced(folder, whole.task))))
    (folder / PARTIAL).unlink()
    _show(folder, counted, copies, samples)


async def _count(
    cfg: RunConfig,
    asked: list[Prompt],
    known: dict[str, dict[str, Any]],
    samples: int,
    sampling: tuple[float, float],
    path: Path,
) -> list[Counted]:
    draw = SamplingParams(0, "score", cfg.evaluation_positions, *sampling, stop=cfg.sampler.draw(0).stop)
    found = {id_: (row["correct"], row["ungraded"]) for id_, row in known.items()}
    missing = [prompt for prompt in asked if prompt.id not in found]
    if missing:
        with tempfile.TemporaryDirectory() as scratch, console.status("loading the student ...") as status:
            async with _student(cfg, Path(scratch)) as student:
                async for chunk in measured(student, missing, samples, draw):
                    append_lines(path, [entry.line(0) for entry in chunk])
                    found |= {entry.prompt.id: (entry.correct, entry.ungraded) for entry in chunk}
                    status.update(f"{len(found)} of {len(asked)} prompts")
    return [Counted(prompt, found[prompt.id][0], samples, found[prompt.id][1]) for prompt in asked]


@asynccontextmanager
async def _student(cfg: RunConfig, scratch: Path) -> AsyncIterator[Evaluation]:
    """The sampler with the weights at the start of training. A flow learner may start from other
    weights than its model's.
    """
    with closing(Services(cfg.learner.student, overlap=cfg.sampler.overlaps)) as services:
        context = part_context(cfg, Requirements(), "sampler", scratch)
        async with cfg.sampler.open(context, services) as sampler:
            if cfg.learner.rollouts is FlowRollout:
                async with cfg.learner.open(
                    part_context(cfg, Requirements(), "learner", scratch), services
                ) as learner:
                    await sampler.publish(learner.publish(), 0)
            yield Evaluation(context, services, cfg.sampler, sampler)


def _balanced(folder: Path, task: Task) -> Jsonl:
    """The task `jsonl` on the written files. All its keys are set, so no key of the old task
    remains. A note is printed for each difference from the old task.
    """
    held_out = {split: _held_out(folder / f"{split}.jsonl", task, split) for split in ("validation", "test")}
    grader, images = task.judge, task.rollouts is FlowRollout
    otherwise = "none" if images else "math"
    where = f"note: {folder / 'recipe.toml'}"
    if grader is None:
        console.print(
            f'{where} judges answers by the grader "{otherwise}" and has one turn only, because jsonl cannot '
            "use the judge and the turns of this task. "
            f'For another grader set task.grader="my_module:function"',
            **NOTE,
        )
    if task.mixes:
        console.print(f"{where} uses each line once per epoch, without the weights of the mix", **NOTE)
    return Jsonl(
        path=str(folder / "prompts.jsonl"),
        validation=held_out["validation"] or 0.0,
        test=held_out["test"],
        grader=grader or otherwise,
        makes="image" if images else "text",
    )


def _held_out(path: Path, task: Task, split: Split) -> str | None:
    """Write the prompts of a split and return the file's path. If the task has none, print a note and
    return None, because only evaluations need them.
    """
    why = ""
    try:
        prompts = list(problems(task, split))
    except DataError as error:
        prompts, why = [], f" ({error})"
    if prompts:
        write_lines(path, [as_line(prompt) for prompt in prompts])
        return str(path)
    console.print(f"note: no {split} prompts{why}. An evaluation on them needs task.{split}=FILE", **NOTE)
    return None


def _show(folder: Path, counted: Sequence[Counted], copies: Sequence[int], samples: int) -> None:
    judged = [
        (entry.correct, times) for entry, times in zip(counted, copies, strict=True) if not entry.ungraded
    ]
    before, times_of = Counter(correct for correct, _ in judged), dict(judged)
    whole, after = len(judged), sum(times for _, times in judged)
    table = Table(f"correct of {samples}", "prompts", "share", "copies of each", "balanced", "share")
    for column in table.columns:
        column.justify = "right"
    for correct in range(samples + 1):
        has, times = before[correct], times_of.get(correct, 0)
        shares = (
            f"{100 * part / max(total, 1):.1f} %" for part, total in ((has, whole), (has * times, after))
        )
        table.add_row(
            str(correct),
            f"{has:,}",
            next(shares),
            str(times) if has else "-",
            f"{has * times:,}",
            next(shares),
        )
    console.print(table)
    outside = len(counted) - whole
    if outside:
        console.print(
            f"note: {outside} prompt(s) have answers that could not be judged. Each is kept once and is not "
            "in this table.",
            style="yellow",
        )
    lines = [
        f"Counts         {folder / 'difficulty.jsonl'}",
        f"Prompts        {folder / 'prompts.jsonl'} ({after + outside:,}, of {len(counted):,} different "
        "ones)",
        f"Train on them  reflux run {shlex.quote(str(folder / 'recipe.toml'))}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
