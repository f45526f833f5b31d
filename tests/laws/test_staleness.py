"""Law 6, Staleness. It is bounded, reached and measured. Without staleness the loop equals the synchronous
loop bit for bit.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

import outside
import tiny
from reflux import checks
from reflux.config.recipe import RunConfig
from reflux.config.step_context import StepContext
from reflux.credit.base import share_credit
from reflux.learners.hf_engine import HFLearner
from reflux.loss.step import StepRequest
from reflux.models.cpu.decoder import cpu_decoder
from reflux.models.generate import decode
from reflux.models.rng import row_key
from reflux.models.text import load_model
from reflux.models.turns import TurnRequest
from reflux.teachers.local_engine import LocalTeacher
from reflux.types import Attempt, Prompt, TokenRollout
from tiny import ask, plainly, same

CHAT = {"kind": "outside:Chat"}
SLOW = "outside:SlowLearner"


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_staleness_is_bounded_and_reached(
    tiny_run: Callable[..., Any], student: str, max_staleness: int
) -> None:
    slow = {"kind": SLOW, "model": student, "lr": 1e-3}
    done = tiny_run("opd", steps=6, max_staleness=max_staleness, task=CHAT, learner=slow, prompts_per_step=2)
    stalenesses = [row["staleness_max"] for row in done.rows("metrics")]
    assert stalenesses[0] == 0
    assert max(stalenesses) == max_staleness
    assert [row["staleness_mean"] for row in done.rows("metrics")] == [
        float(staleness) for staleness in stalenesses
    ]
    asked = Counter((row["step"], row["prompt"]) for row in done.rows("attempts") if row["kind"] == "attempt")
    assert set(asked) == {(1 + i // 2, f"train-{i}") for i in range(12)}
    assert set(asked.values()) == {1}


def test_without_staleness_every_attempt_is_of_the_current_student(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=3, task=CHAT)
    assert [(row["staleness_max"], row["staleness_mean"]) for row in done.rows("metrics")] == [(0, 0.0)] * 3
    assert {(row["step"], row["version"]) for row in done.rows("attempts") if row["kind"] == "attempt"} == {
        (1, 0),
        (2, 1),
        (3, 2),
    }


@pytest.mark.parametrize("recipe", ["opd", "full", "vopd"])
def test_without_staleness_the_loop_is_the_handwritten_one(
    tiny_run: Callable[..., Any], student: str, teacher: str, recipe: str
) -> None:
    settings = {"steps": 3, "task": CHAT, "group_size": 2, "credit": {"prefix": {"length": 7}}}
    done = tiny_run(recipe, **settings)
    cfg = tiny.config(recipe, student, teacher, **settings)
    by_hand = asyncio.run(synchronous(cfg))
    assert same(done.state, by_hand)


async def synchronous(cfg: RunConfig) -> dict[str, Any]:
    """Sample, score, give credit, step: without the library's pipeline, gathering and loop."""
    acting = load_model(cfg.learner.model, "learner.model")
    stream = cfg.task.prompts("train", cfg.seed, 0)
    context, services = tiny.context(checks.join(cfg), model=cfg.learner.model), tiny.services()
    async with (
        cfg.learner.open(context, services) as learner,
        cfg.teachers["main"].open(context, services) as teacher,
    ):
        assert isinstance(learner, HFLearner)
        assert isinstance(teacher, LocalTeacher)
        for step in range(cfg.steps):
            prompts = list(islice(stream, cfg.prompts_per_step))
            acting.net.load_state_dict(dict(learner.weights))
            groups = act(cfg, acting, prompts, step)
            # in-process parts answer in the order of ids
            by_id = sorted(groups, key=lambda group: group[0].rollout.prompt.id)
            await ask(teacher, *plainly(attempt for group in by_id for attempt in group))
            share_credit(groups, cfg.credit, StepContext(step, 0))
            await learner.step(
                StepRequest(groups, cfg.objectives, StepContext(step, 0), cfg.loss_aggregation)
            )
        return {
            name: value.clone() if hasattr(value, "clone") else value
            for name, value in learner.state().items()
        }


def act(cfg: RunConfig, model: Any, prompts: list[Prompt], step: int) -> list[list[Attempt]]:
    render = model.renderer(None, {})
    rows = [
        (prompt, sample)
        for prompt in sorted(prompts, key=lambda prompt: prompt.id)
        for sample in range(cfg.group_size)
    ]
    rows.sort(key=lambda row: -len(render.ids(row[0].messages)))
    draw = cfg.draw(step)
    asks = [
        TurnRequest(
            render.ids(p.messages), draw.max_positions, row_key(cfg.seed, "train", step, p.id, s, 0), draw
        )
        for p, s in rows
    ]
    made = {}
    for (prompt, sample), one, turn in zip(
        rows, asks, decode(model, asks, lambda: step, cpu_decoder(model)), strict=True
    ):
        made[prompt.id, sample] = Attempt(
            TokenRollout(
                prompt=prompt, sample=sample, version=step, finish=turn.finish,
                mask_T=np.ones(len(turn.tokens), dtype=bool), logp_T=turn.logp_T,
                prompt_tokens=np.asarray(one.ids),
                tokens_T=np.asarray(turn.tokens), text="", messages=prompt.messages,
            )
        )  # fmt: skip
    return [[made[prompt.id, sample] for sample in range(cfg.group_size)] for prompt in prompts]


def test_extrapolation_resamples_attempts_in_flight_and_staleness_restarts(
    tiny_run: Callable[..., Any], student: str
) -> None:
    outside.HEARD.clear()
    slow = {"kind": SLOW, "model": student, "lr": 1e-3}
    settings = {"steps": 5, "max_staleness": 2, "task": CHAT, "learner": slow, "prompts_per_step": 2}
    done = tiny_run("opd", **settings, extrapolation={"kind": "outside:Jump", "at": 3})
    stalenesses = [row["staleness_max"] for row in done.rows("metrics")]
    assert stalenesses[2] == 2
    # sampled again, by the student after extrapolation
    assert stalenesses[3] == 0
    attempts = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    assert {row["prompt"] for row in attempts} == {f"train-{i}" for i in range(10)}
    learnt = [row["prompt"] for row in done.rows("attempts") if row["kind"] == "learned"]
    # each prompt once, in order
    assert learnt == [f"train-{i}" for i in range(10)]


def test_a_run_with_staleness_still_changes_weights_with_a_ratio(
    tiny_run: Callable[..., Any], student: str
) -> None:
    """Attempts of an older student are weighted by the ratio: the recorded log-probs are the older student's,
    and the loss uses the difference.
    """
    slow = {"kind": SLOW, "model": student, "lr": 3e-2}
    done = tiny_run("opd", steps=3, max_staleness=1, task=CHAT, learner=slow, prompts_per_step=2)
    pairs = {}
    for row in done.rows("attempts"):
        pairs.setdefault((row["step"], row["prompt"]), {}).update(row)
    gaps = {step: [] for step in (1, 2, 3)}
    for (step, _), row in pairs.items():
        gaps[step] += [abs(now - then) for now, then in zip(row["student_logp"], row["logp"], strict=True)]
    assert max(gaps[1]) < 1e-4
    assert max(gaps[2]) > 1e-2
