"""reflux eval: evaluate one model on one task."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from reflux import checks
from reflux.config.overrides import merge, nest, split_override, unpack
from reflux.config.recipe import RunConfig, from_table, part_context, saved_table
from reflux.config.requirements import Requirements
from reflux.evals.accuracy import Accuracy
from reflux.evals.evaluation import Evaluation
from reflux.evals.problems import problems as test_problems
from reflux.evals.problems import seen, told
from reflux.models.locations import local_folder
from reflux.models.text import load_tokenizer
from reflux.runtime.services import Services

console = Console()


def evaluate_model(
    model: str, task: str | None, problems: int, samples: int, max_tokens: int | None, overrides: list[str]
) -> None:
    """Print the results of the evaluation `accuracy`; no file is written. model: a folder, a hub id, a
    shipped model, or a run directory, whose task and sampler are then used. task: the kind of another task.
    problems: their number. samples: further sampled answers per problem. max_tokens: the length limit of an
    answer.

    A local flow model is recognised by its files. A flow model on the hub that is not local yet needs the
    override sampler.kind=flow.
    """
    table = _table(model)
    if task is not None and task != table["task"]["kind"]:
        table["task"] = {"kind": task}
    for path, value in map(split_override, overrides):
        table = merge(table, nest(path.split("."), unpack(value), table))
    from reflux.runtime.library_logging import quiet_libraries

    quiet_libraries()
    if table["sampler"]["kind"] == "flow":
        table["learner"]["kind"], table["objectives"] = "flow", [{"kind": "velocity_kl"}]
    else:
        load_tokenizer(model, "MODEL")
    cfg = from_table(table)
    checks.inputs(cfg)
    longest = max_tokens or cfg.evaluation_positions
    asked = Accuracy(problems=problems, samples=samples, max_tokens=longest, split="test", examples=0)
    found = asyncio.run(_accuracy(cfg, asked))
    if again := seen(cfg.task, list(islice(test_problems(cfg.task, "test"), problems))):
        console.print(told(again), style="yellow", markup=False, highlight=False)
    for name, value in found.items():
        if name != "examples":
            console.print(f"{name:16} {_shown(value)}", markup=False, highlight=False)


def _table(model: str) -> dict[str, Any]:
    folder = local_folder(model, "MODEL")
    flow = folder is not None and (folder / "model_index.json").is_file()
    table: dict[str, Any] = {"task": {"kind": "word_problems"}, "sampler": {"kind": "hf", "max_tokens": 512}}
    if flow:
        table = {"task": {"kind": "glyphs"}, "sampler": {"kind": "flow"}}
    # the settings by which a run renders its prompts
    chat: dict[str, Any] = {}
    if (Path(model) / "config.toml").is_file():
        own = saved_table(Path(model))
        learner, sampler = own["learner"], own["sampler"].get("generate", own["sampler"])
        table = {"steps": own["steps"], "task": own["task"], "sampler": sampler}
        chat = {key: learner[key] for key in ("system", "template", "prompt_suffix") if key in learner}
    return {**table, "learner": {"model": model, **chat}, "objectives": [{"kind": "nll"}]}


async def _accuracy(cfg: RunConfig, asked: Accuracy) -> dict[str, Any]:
    student, overlap = cfg.learner.student, cfg.sampler.overlaps
    with tempfile.TemporaryDirectory() as scratch, closing(Services(student, overlap=overlap)) as services:
        context = part_context(cfg, Requirements(), "sampler", Path(scratch))
        async with cfg.sampler.open(context, services) as sampler:
            return await asked.measure(Evaluation(context, services, cfg.sampler, sampler))


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
