"""reflux signal: measure, before training, how well each signal that a recipe could learn from ranks the
student's attempts, against the verdicts of the task's own verifier.

The student is that of the start of training. It samples as in training, except that a schedule of lengths
does not cut its answers.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reflux import checks
from reflux.config.context import PartContext
from reflux.config.recipe import RunConfig, Track, config_hash, load_recipe, part_context
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams, seed_of
from reflux.errors import ConfigError, DataError, RunError
from reflux.evals.attempt_signals import Row, described, measured
from reflux.evals.prompt_difficulty import training_prompts
from reflux.evals.signal_summary import summarised
from reflux.storage.files import append_lines, write_lines, write_text
from reflux.storage.partial_results import taken_up
from reflux.storage.run_dir import check_place, make
from reflux.storage.summary import commit
from reflux.tasks.base import JUDGED
from reflux.teachers.base import alias_of
from reflux.types import FlowRollout, Prompt

if TYPE_CHECKING:
    from reflux.evals.evaluation import Evaluation
    from reflux.rewards.opened_rewards import Rewards

console = Console()
PARTIAL = "signal.partial.jsonl"
# attempts per prompt where the recipe has one
SAMPLES = 8
# columns of the table in the terminal
WIDTH = 4
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def rank_signals(
    recipe: str, overrides: list[str], samples: int | None, prompts: int, out: Path | None
) -> None:
    """Sample attempts, judge and score them as a run would, and print how each signal ranks them (see
    `attempt_signals.described` and `metrics.ranking.Ranking`).

    Writes `attempts.jsonl` (one line per attempt), `signal.json` and `signal.html`, each completely or not at
    all. Attempts are kept as they come, so a call that was killed and is repeated loses at most 32 prompts.

    samples: attempts per prompt; None: the recipe's group_size, or 8 if that is 1. prompts: the number of
    training prompts. out: the output folder. Raises ConfigError for a task that judges nothing and for a
    recipe of images, RunError for a folder that holds finished signals, or signals made with other settings,
    and ServerError if a judge judges nothing.
    """
    whole = load_recipe(recipe, overrides)
    _refuse(whole)
    samples = samples or (whole.group_size if whole.group_size > 1 else SAMPLES)
    # In this process, and without what only training needs.
    cfg = replace(whole, group_size=samples, evals={}, extrapolation=None, cluster=None, track=Track())
    folder = out or Path("runs") / f"{cfg.recipe}-signal"
    check_place(folder)
    if (folder / "signal.json").exists() and not (folder / PARTIAL).exists():
        raise RunError(f"{folder} already contains signals. Choose another folder with --out.")
    requirements = checks.join(cfg) | Requirements(logp=bool(cfg.teachers))
    asked, _ = training_prompts(cfg.task, cfg.seed, prompts)
    if not asked:
        raise DataError("the task has no training prompts, so there is nothing to sample")
    checks.inputs(cfg)
    from reflux.runtime.library_logging import quiet_libraries

    quiet_libraries()
    make(folder)
    draw = _draw(cfg)
    said = {
        "prompts": len(asked),
        "samples": samples,
        "temperature": draw.temperature,
        "top_p": draw.top_p,
        "max_tokens": draw.max_positions,
        "config_hash": config_hash(whole),
        "seed": cfg.seed,
    }
    known = taken_up(folder / PARTIAL, said, "signals")
    rows, chat = asyncio.run(_rows(cfg, requirements, asked, known, draw, folder))
    found = _summary(cfg, said, rows, chat)
    if len(asked) < prompts:
        found["notes"].append(f"The task has {len(asked):,} different training prompts, and all were used.")
    _finish(folder, found, rows)


def _refuse(cfg: RunConfig) -> None:
    """Raise ConfigError for a recipe whose attempts have no truth to compare with, or are no texts."""
    if cfg.learner.rollouts is FlowRollout:
        raise ConfigError(
            "signal compares signals on texts, and the attempts of this recipe are images. Choose a recipe "
            "of texts."
        )
    if not cfg.task.judges and cfg.task.multi_turn:
        raise ConfigError(
            "task: signals are compared with the verdicts of the task on texts, and only the environment of "
            "this task judges. Choose a task that judges texts."
        )
    if not cfg.task.judges:
        raise ConfigError(
            'task: signals are compared with the verdicts of the task, and with the grader "none" nothing is '
            f"ever judged. {JUDGED}."
        )


def _draw(cfg: RunConfig) -> SamplingParams:
    """The sampling parameters of the first step's attempts, with the length limit of evaluations. A sampler
    that takes its training attempts from elsewhere samples from the student for the purpose "score".
    """
    purpose = "train" if cfg.sampler.on_policy else "score"
    return replace(cfg.draw(0), purpose=purpose, max_positions=cfg.evaluation_positions)


async def _rows(
    cfg: RunConfig,
    requirements: Requirements,
    asked: Sequence[Prompt],
    known: Sequence[Row],
    draw: SamplingParams,
    folder: Path,
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """The rows of all attempts, in order, and the use of chat servers. known: lines of an earlier call."""
    found = {row["id"]: row["attempts"] for row in known if "id" in row}
    chat: list[dict[str, dict[str, float]]] = [row["chat"] for row in known if "chat" in row]
    missing = [prompt for prompt in asked if prompt.id not in found]
    if missing:
        with console.status("loading the models ...") as status:
            async for chunk, used in _measured(cfg, requirements, missing, draw, folder):
                lines = [{"id": name, "attempts": rows} for name, rows in chunk.items()]
                append_lines(folder / PARTIAL, [*lines, *([{"chat": used}] if used else [])])
                found |= chunk
                chat.append(used)
                status.update(f"{len(found)} of {len(asked)} prompts")
    return [row for prompt in asked for row in found[prompt.id]], _added(chat)


async def _measured(
    cfg: RunConfig, requirements: Requirements, prompts: Sequence[Prompt], draw: SamplingParams, folder: Path
) -> AsyncIterator[tuple[dict[str, list[Row]], dict[str, dict[str, float]]]]:
    """The rows of each prompt and the use of chat servers, as they come."""
    async with _opened(cfg, requirements, folder) as (evaluation, rewards):
        async for chunk in measured(evaluation, rewards, prompts, cfg.group_size, draw):
            yield chunk, evaluation.services.usage.take()


@asynccontextmanager
async def _opened(
    cfg: RunConfig, requirements: Requirements, folder: Path
) -> AsyncIterator[tuple[Evaluation, Rewards]]:
    """The parts of the run with the weights at the start of training. Answers of judges are stored in
    `folder`, as in a run, so that none is asked for twice.
    """
    from reflux.evals.evaluation import Evaluation
    from reflux.loop import open_parts
    from reflux.runtime.services import Services

    cfg = replace(cfg, max_staleness=0, ahead=None)
    student, overlap = cfg.learner.student, cfg.sampler.overlaps
    with tempfile.TemporaryDirectory() as scratch, closing(Services(student, overlap=overlap)) as services:

        def context(name: str) -> PartContext:
            kept = folder if name.startswith("rewards.") else Path(scratch)
            return part_context(cfg, requirements, name, kept)

        async with open_parts(cfg, context, services) as (learner, sampler, rewards, teachers, _):
            await sampler.publish(learner.publish(), 0)
            await teachers.publish(learner.publish(), 0)
            yield Evaluation(context("sampler"), services, cfg.sampler, sampler, teachers), rewards


def _added(chat: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The sums by role and name."""
    sums: dict[str, dict[str, float]] = {}
    for used in chat:
        for role, counts in used.items():
            for name, value in counts.items():
                of_role = sums.setdefault(role, {})
                of_role[name] = of_role.get(name, 0) + value
    return sums


def _summary(
    cfg: RunConfig, settings: dict[str, Any], rows: Sequence[Row], chat: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """The content of signal.json."""
    aliases = sorted({alias_of(table, teacher) for table, teacher in cfg.teachers.items()})
    truths = [f"rewards.{name}" for name, reward in cfg.rewards.items() if reward.verifies]
    return {
        "recipe": cfg.recipe,
        **summarised(rows, described(cfg.rewards, aliases), truths, seed_of("signal", cfg.seed)),
        "settings": settings,
        **({"chat": chat} if chat else {}),
        "commit": commit(),
    }


def _finish(folder: Path, found: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the files and print the table. Names and reasons are printed as data."""
    from reflux.reports.signal_page import HEADER, chat_costs, lead, signal_rows, write_signal_page

    write_lines(folder / "attempts.jsonl", list(rows))
    write_text(folder / "signal.json", json.dumps(found, indent=2) + "\n")
    page = write_signal_page(folder)
    (folder / PARTIAL).unlink()
    console.print(lead(found), **PLAIN)
    # The other columns do not fit into 80 characters.
    table = Table(*HEADER[:WIDTH])
    for column in table.columns[1:]:
        column.justify = "right"
    for cells, _ in signal_rows(found):
        table.add_row(*map(Text, cells[:WIDTH]))
    console.print(table)
    for note in found["notes"]:
        console.print(f"note: {note}", style="yellow", **PLAIN)
    for role, told in chat_costs(found):
        console.print(f"chat, {role}: {told}", **PLAIN)
    console.print(f"Numbers   {folder / 'signal.json'}", **PLAIN)
    console.print(f"Attempts  {folder / 'attempts.jsonl'}", **PLAIN)
    console.print(f"Picture   {page}", **PLAIN)
