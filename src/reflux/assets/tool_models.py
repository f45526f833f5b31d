"""Trains the models of the tasks with tools on worked attempts (`reflux.assets.tool_lessons`), and measures
them as a run does: with the sampler, the driver and the environments of the tasks.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflux.assets.characters import character_tokenizer
from reflux.assets.specs import ModelSpec
from reflux.assets.store import save
from reflux.assets.text_models import IGNORED, blank, train
from reflux.assets.tool_lessons import Lesson, encoded, tool_lessons
from reflux.config.recipe import from_table, part_context
from reflux.config.requirements import Requirements
from reflux.evals.accuracy import Accuracy
from reflux.evals.evaluation import Evaluation
from reflux.metrics.intervals import wilson
from reflux.runtime.services import Services
from reflux.tasks.calculator import Calculator
from reflux.tasks.ledger import Ledger
from reflux.tasks.shopping import Shopping
from reflux.tasks.tools import ToolTask

TASKS = ("shopping", "calculator", "ledger")
EXAM = {
    "task": {"kind": "mix", "parts": {kind: {"kind": kind} for kind in TASKS}},
    "sampler": {"kind": "hf", "max_tokens": 160},
    "objectives": [{"kind": "nll"}],
}
PROBLEMS = 500


@dataclass(frozen=True)
class ToolSpec(ModelSpec):
    """A model that calls tools over several turns. Every lesson has prices of its own, so it is read from the
    replies and not known by heart.
    """

    lessons: tuple[ToolTask, ...] = (Shopping(drift_every=1), Calculator(), Ledger())

    @property
    def asked(self) -> str:
        return "the toy tasks `shopping`, `calculator` and `ledger`"


# The student learns with smaller numbers than it is tested on, and for fewer steps.
TOOL_SPECS = {
    "tool_teacher": ToolSpec("tool_teacher", layers=2, steps=1600, seed=31, inner=128, batch=48),
    "tool_student": ToolSpec(
        "tool_student",
        layers=2,
        steps=260,
        seed=32,
        inner=128,
        batch=48,
        lessons=(Shopping(drift_every=1, largest_price=12), Calculator(largest=40), Ledger(largest=25)),
    ),
}


def make(spec: ToolSpec, out: Path) -> list[str]:
    """Train, measure and save a model; the lines of its card."""
    tokenizer = character_tokenizer()
    model = train(blank(spec, tokenizer), spec, attempts(spec, tokenizer))
    with tempfile.TemporaryDirectory() as scratch:
        save(model, tokenizer, spec, [], Path(scratch) / spec.name)
        report = measure(Path(scratch) / spec.name, spec, model.num_parameters())
    save(model, tokenizer, spec, report, out)
    return report


def attempts(spec: ToolSpec, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches (ids_BT, labels_BT), without end."""
    stream = tool_lessons(spec.lessons, spec.seed)
    while True:
        yield encode(list(islice(stream, spec.batch)), tokenizer)


def encode(lessons: list[Lesson], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(ids_BT, labels_BT), padded on the right. Only what `encoded` says is trained on has labels."""
    rows, labels = list[Tensor](), list[Tensor]()
    for lesson in lessons:
        ids, learnt = encoded(lesson, tokenizer)
        rows.append(torch.tensor(ids))
        labels.append(torch.where(torch.tensor(learnt), rows[-1], IGNORED))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, float(tokenizer.pad_token_id)), pad(labels, True, float(IGNORED))


def measure(model: Path, spec: ToolSpec, parameters: int) -> list[str]:
    """Lines of text on a model: one with the parameters and the training settings, one for the accuracy on
    all test problems, and one for each task. model: its folder.
    """
    lines = [
        f"{parameters:,} parameters, {spec.steps} steps of {spec.batch} attempts, seed {spec.seed}, "
        f"{torch.get_num_threads()} thread(s)"
    ]
    found = asyncio.run(examined(model))
    for key in ("", *(f".{kind}" for kind in TASKS)):
        count = found[f"accuracy{key}.problems"] if key else found["problems"]
        right = round(found[f"accuracy{key}"] * count)
        low, high = wilson(right, count)
        title = f"held-out problems of `{key[1:]}`" if key else "held-out problems"
        lines.append(
            f"{title}: {right}/{count} right, greedy ({right / count:.1%}, 95 % interval {low:.1%} to "
            f"{high:.1%})"
        )
    return lines


async def examined(model: Path) -> dict[str, Any]:
    """The table of the evaluation `accuracy` on test problems. No choice depends on these problems."""
    cfg = from_table({**EXAM, "learner": {"model": str(model)}})
    with tempfile.TemporaryDirectory() as scratch, closing(Services(cfg.learner.student)) as services:
        context = part_context(cfg, Requirements(), "sampler", Path(scratch))
        async with cfg.sampler.open(context, services) as sampler:
            asked = Accuracy(problems=PROBLEMS, split="test", examples=0)
            return await asked.measure(Evaluation(context, services, cfg.sampler, sampler))
