"""A run of two steps through the public interface, and what is left of the student on disk."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from architectures.parity import own_logp, worst_of
from architectures.text import write_prompts
from reflux.cli.evaluate import evaluate_model
from reflux.config.recipe import load_recipe
from reflux.loop import train
from reflux.storage import checkpoints
from reflux.training import Options

STEPS = 2
# no evaluation during the run: `reflux eval` is tried after it
QUIET = {f"evals.{name}": "none" for name in ("accuracy", "test_accuracy", "teacher_accuracy", "agreement")}
SMALL = {
    "base": "hub",
    "steps": STEPS,
    "prompts_per_step": 4,
    "sampler.max_tokens": 12,
    "learner.lr": 1e-3,
    "learner.device": "cpu",
    "sampler.device": "cpu",
    "teachers.main.device": "cpu",
    "threads": 1,
    "task.kind": "jsonl",
    "task.validation": 0.25,
    **QUIET,
}


def two_steps(student: Path, teacher: Path, out: Path) -> dict[str, float]:
    """Train in the run directory `out`, and compare the loss and the exported student with the two models on
    their own. `reflux eval` on the run must give an accuracy.
    """
    prompts = run(student, teacher, out)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        evaluate_model(str(out), None, 3, 0, 4, [f"task.test={prompts}", "sampler.device=cpu"])
    assert re.search(r"^accuracy +[01]\.\d+$", said.getvalue(), re.MULTILINE), said.getvalue()
    return {"loss": loss_gap(student, teacher, out), "exported student": exported_gap(student, out)}


def adapter_run(student: Path, teacher: Path, out: Path) -> dict[str, float]:
    """Train adapters. Only whether the run refuses them is of interest."""
    run(student, teacher, out, **{"learner.lora.rank": 2})
    return {}


def run(student: Path, teacher: Path, out: Path, **changes: Any) -> Path:
    """Train two steps. Returns the file with the prompts."""
    prompts = write_prompts(out.with_suffix(".jsonl"), 16)
    models = {"learner.model": str(student), "teachers.main.model": str(teacher), "task.path": str(prompts)}
    asyncio.run(train(load_recipe("full", {**SMALL, **models, **changes}), Options(out)))
    return prompts


def started(out: Path) -> bool:
    """True where the run has taken a step."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and bool(metrics.read_text())


@torch.no_grad()
def loss_gap(student: Path, teacher: Path, out: Path) -> float:
    """Nats between the loss of step 1 and the mean reverse KL of its tokens, from the two models on one
    attempt at a time.
    """
    rows = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    made, ours, theirs = AutoTokenizer.from_pretrained(student), plain(student), plain(teacher)
    costs = []
    for row in rows:
        if row["kind"] == "attempt" and row["step"] == 1:
            asked = [{"role": "user", "content": row["question"]}]
            ids = made.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
            logp, logq = (
                own_logp(net, ids + row["tokens"], len(made))[len(ids) - 1 : -1] for net in (ours, theirs)
            )
            costs.append((logp.exp() * (logp - logq)).sum(-1))
    return abs(float(torch.cat(costs).mean()) - first["loss"])


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def exported_gap(student: Path, out: Path) -> float:
    """Nats between the exported student as transformers loads it and the learner's last weights."""
    newest = checkpoints.of_step(out / "checkpoints", STEPS)
    state: dict[str, Any] = checkpoints.read(newest / "learner")
    learnt = {
        name.removeprefix("weight/"): value for name, value in state.items() if name.startswith("weight/")
    }
    before, learner, exported = plain(student), plain(student), plain(out / "student")
    missing = learner.load_state_dict(learnt, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    made = AutoTokenizer.from_pretrained(student)
    text = made("Add 3 and 4. Show your work.")["input_ids"]
    first, last, kept = (own_logp(net, text, len(made)) for net in (before, learner, exported))
    assert worst_of([first], [last]) > 0, "two steps changed nothing"
    return worst_of([last], [kept])
