"""Verdicts: whoever learns or chooses by them gets some."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

from reflux.accelerators.extrapolate import Extrapolate
from reflux.config import RunConfig
from reflux.rewards.verifier import Verifier
from reflux.tasks.jsonl import GRADERS, Jsonl
from reflux.tasks.mix import Mix


def problems(cfg: RunConfig) -> Iterator[str]:
    parts = list(_parts("task", cfg.task))
    for where, task in parts:
        module = task.grader.partition(":")[0] if isinstance(task, Jsonl) and task.grader not in GRADERS else None
        if module is not None and not _importable(module):
            yield f"{where}.grader: there is no module '{module}' for it. Is it installed, or its folder on PYTHONPATH?"
    if all(isinstance(task, Jsonl) and task.grader == "none" for _, task in parts):
        yield from _unjudged(cfg)


def _unjudged(cfg: RunConfig) -> Iterator[str]:
    remedy = 'Name one that judges, such as task.grader = "my_module:function"'
    if isinstance(cfg.reward, Verifier):
        yield f'reward: the verifier asks the task for verdicts, and with its grader "none" nothing is ever judged. {remedy}.'
    if isinstance(cfg.accelerator, Extrapolate) and cfg.accelerator.score == "accuracy":
        yield (
            f'accelerator.score = "accuracy" compares weights by the task\'s verdicts, and with its grader "none" nothing is ever judged. '
            f'{remedy}, or use score = "minus_kl".'
        )


def _parts(where: str, task: Any) -> Iterator[tuple[str, Any]]:
    """A task, or those of a mix."""
    if isinstance(task, Mix):
        for name, part in task.parts.items():
            yield from _parts(f"{where}.parts.{name}", part)
    else:
        yield where, task


def _importable(module: str) -> bool:
    """Could it be imported? Nothing is: not even the packages it lies in."""
    first, *inner = module.split(".")
    try:
        found = find_spec(first)
        for number in range(len(inner)):
            places = None if found is None else found.submodule_search_locations
            if places is None:
                return False
            found = PathFinder.find_spec(".".join([first, *inner[: number + 1]]), places)
    except ValueError:  # an empty name, or a module that was made by hand
        return False
    return found is not None
