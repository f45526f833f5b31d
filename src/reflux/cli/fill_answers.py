"""reflux answers: ask a teacher once for answers to the training prompts of a recipe."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from reflux.clients.chat import ChatClient
from reflux.config.recipe import RunConfig, load_recipe, part_context
from reflux.config.requirements import Requirements
from reflux.engines.endpoints.teacher_answers import teacher_answers
from reflux.errors import ConfigError, ServerError
from reflux.evals.prompt_difficulty import training_prompts
from reflux.runtime.services import Services
from reflux.storage.files import append_lines, keep_lines
from reflux.storage.run_dir import take_lock
from reflux.tasks.answer_index import StoredAnswers
from reflux.types import Prompt

console = Console()
# Prompts that are asked for at once. Their answers are written together.
AT_ONCE = 64


def fill_answers(recipe: str, overrides: list[str], count: int) -> None:
    """Fill the index file of a recipe with the task `answered`. Prompts that have a line are not asked again,
    so a call that was stopped can be repeated. count: the number of prompts; 0: all that the run trains on.

    Raises ConfigError for a recipe with another task, DataError for a file that another teacher has filled,
    and ServerError at the end if prompts stay without answers.
    """
    cfg = load_recipe(recipe, overrides)
    stored = cfg.task.stored_answers
    if stored is None:
        raise ConfigError(
            'task: this task stores no answers. Wrap it: task.kind = "answered", with the tables [task.of] '
            "and [task.teacher], and task.path"
        )
    if reasons := list(stored.teacher.refusals("task.teacher", cfg)):
        raise ConfigError("\n".join(reasons))
    prompts = training_prompts(stored.task, cfg.seed, count or cfg.steps * cfg.prompts_per_step)[0]
    stored.path.parent.mkdir(parents=True, exist_ok=True)
    with stored.path.with_name(f".{stored.path.name}.lock").open("w") as lock:
        if note := take_lock(lock, stored.path):
            console.print(note, style="yellow", markup=False)
        # A line that a stopped call has not finished is removed.
        keep_lines(stored.path, lambda row: True)
        known = stored.read() if stored.path.exists() else {}
        missing = [prompt for prompt in prompts if prompt.id not in known]
        failed, used = _filled(cfg, stored, missing) if missing else (Counter[str](), {})
    spent = ", ".join(f"{name} {number:g}" for name, number in sorted(used.items()))
    console.print(
        f"{stored.path}: {len(prompts) - failed.total()} of {len(prompts)} prompts have answers, "
        f"{len(missing) - failed.total()} of them new ({spent or 'nothing was asked'})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if failed:
        listed = "\n".join(f"  {number} x {reason}" for reason, number in failed.most_common())
        raise ServerError(
            f"{failed.total()} prompts have no answers. Repeat the command to ask for them again. The "
            f"reasons:\n{listed}"
        )


def _filled(
    cfg: RunConfig, stored: StoredAnswers, missing: Sequence[Prompt]
) -> tuple[Counter[str], Mapping[str, float]]:
    """Ask for the missing answers. Returns the reasons of failures with their numbers, and what was used."""
    with tempfile.TemporaryDirectory() as scratch, closing(Services(cfg.learner.student)) as services:
        context = replace(part_context(cfg, Requirements(), "answers", Path(scratch)), folder=Path(scratch))

        async def ask() -> Counter[str]:
            async with stored.teacher.open(context, services) as client:
                return await _asked(client, stored, missing)

        return asyncio.run(ask()), services.usage.total.get("teacher", {})


async def _asked(client: ChatClient, stored: StoredAnswers, missing: Sequence[Prompt]) -> Counter[str]:
    """Ask for the answers and write them. Returns the reasons of failures with their numbers."""
    failed: Counter[str] = Counter()
    waiting = iter(missing)
    with console.status(f"0 of {len(missing)} prompts") as status:
        done = 0
        while chunk := list(islice(waiting, AT_ONCE)):
            asked = (teacher_answers(client, prompt.messages, stored.sampling) for prompt in chunk)
            found = await asyncio.gather(*asked, return_exceptions=True)
            rows = []
            for prompt, answers in zip(chunk, found, strict=True):
                if isinstance(answers, ServerError):
                    failed[str(answers)] += 1
                elif isinstance(answers, BaseException):
                    raise answers
                else:
                    rows.append(stored.line(prompt, answers))
            append_lines(stored.path, rows)
            done += len(chunk)
            status.update(f"{done} of {len(missing)} prompts")
    return failed
