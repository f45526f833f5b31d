"""Law 8, Own rng. Samples depend only on (run seed, purpose, step, prompt, sample, turn, position).
Observers, such as evaluations, change nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import outside
import tiny
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams, StepContext
from reflux.loop import lasting, open_parts
from reflux.models.rng import gumbel, row_key
from reflux.training import Options, Run
from reflux.types import Attempt, Prompt
from tiny import same

PLAIN = {"steps": 3, "task": {"kind": "outside:Chat"}}
ONLOOKERS: dict[str, dict[str, Any]] = {
    "evaluation": {
        "evals__accuracy": {"problems": 3, "samples": 2},
        "evals__agreement": {"prompts": 4},
        "eval_every": 1,
    },
    "foresight": {"evals__foresight": {"k": 3}, "eval_every": 1},
    "teacher_accuracy": {"evals__teacher_accuracy": {"problems": 3}},
    "test_accuracy": {"evals__test_accuracy": {"problems": 3}},
    "preflight": {"skip_checks": []},
    "saving": {"save_every": 1, "keep_checkpoints": 3},
    "variance": {"log_variance": True},
    "tracker": {"track": {"kind": "tensorboard"}},
    "shut extrapolation": {"extrapolation": {"kind": "outside:Jump", "at": 99}},
    "the student as a teacher that nobody hears": {
        "teachers__self": {"kind": "self", "context": {"kind": "privileged"}}
    },
    "a second teacher that nobody hears": {"teachers__other": {"kind": "local", "model": "reflux-student"}},
}


@pytest.mark.parametrize("recipe", ["vopd", "sft"])
@pytest.mark.parametrize("who", ONLOOKERS)
def test_observers_change_nothing(tiny_run: Callable[..., Any], student: str, recipe: str, who: str) -> None:
    more = {
        key: dict(value, model=student) if key == "teachers__other" else value
        for key, value in ONLOOKERS[who].items()
    }
    if recipe == "sft":
        more = {
            key: value
            for key, value in more.items()
            if "agreement" not in key and "teacher" not in key and key != "log_variance"
        }
        if not more:
            pytest.skip("fine-tuning has no teacher and no sampled gradient")
    assert same(tiny_run(recipe, **PLAIN).state, tiny_run(recipe, **PLAIN, **more).state)


def test_another_seed_is_another_run(tiny_run: Callable[..., Any]) -> None:
    assert not same(tiny_run("vopd", **PLAIN).weights, tiny_run("vopd", **PLAIN, seed=1).weights)


def test_the_global_rng_is_neither_read_nor_needed(tiny_run: Callable[..., Any]) -> None:
    states = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        states.append(tiny_run("vopd", **PLAIN).state)
    assert same(*states)


# --- the sampler alone


@asynccontextmanager
async def sampler(cfg: Any, folder: Path) -> AsyncIterator[Any]:
    run = Run.open(cfg, Requirements(), Options(folder))
    async with (
        lasting(run),
        open_parts(replace(cfg, rewards={}, teachers={}), run.context, run.services) as (_, acting, *_),
    ):
        yield acting


async def ask(acting: Any, prompts: Iterable[Prompt], n: int, draw: SamplingParams) -> list[list[Attempt]]:
    prompts = list(prompts)
    draw = replace(draw, cohort=len(prompts))
    return await asyncio.gather(*(acting.sample(prompt, n, draw) for prompt in prompts))


def sampled(cfg: Any, folder: Path, script: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        async with sampler(cfg, folder) as acting:
            return await script(acting)

    return asyncio.run(main())


@pytest.fixture
def cfg(student: str, teacher: str) -> Any:
    return tiny.config("opd", student, teacher, task={"kind": "outside:Chat"})


PROMPTS = list(islice(outside.Chat().prompts("train", 0), 6))
DRAW = SamplingParams(3, "train", 12)


def tokens(group: list[Attempt]) -> list[list[int]]:
    return [attempt.rollout.tokens_T.tolist() for attempt in group]  # type: ignore[attr-defined]


def test_other_prompts_and_siblings_change_no_token(cfg: Any, tmp_path: Path) -> None:
    async def script(acting: Any) -> Any:
        everyone = await ask(acting, PROMPTS, 3, DRAW)
        alone = [(await ask(acting, [prompt], 1, DRAW))[0] for prompt in PROMPTS]
        backwards = (await ask(acting, PROMPTS[::-1], 2, DRAW))[::-1]
        return everyone, alone, backwards

    everyone, alone, backwards = sampled(cfg, tmp_path / "run", script)
    for whole, single, pair in zip(everyone, alone, backwards, strict=True):
        assert tokens(whole)[:1] == tokens(single)
        assert tokens(whole)[:2] == tokens(pair)
        np.testing.assert_allclose(whole[0].rollout.logp_T, single[0].rollout.logp_T, atol=1e-5)
    # all samples differ from each other
    assert len({tuple(sample) for group in everyone for sample in tokens(group)}) == 18


@pytest.mark.parametrize("change", [{"step": 4}, {"purpose": "eval"}, {"purpose": "score"}])
def test_step_and_purpose_have_their_own_rng(cfg: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    async def script(acting: Any) -> Any:
        return [await ask(acting, PROMPTS[:2], 1, draw) for draw in (DRAW, replace(DRAW, **change), DRAW)]

    one, other, again = (list(map(tokens, groups)) for groups in sampled(cfg, tmp_path / "run", script))
    assert one == again
    assert one != other


@pytest.mark.parametrize("cap", [1, 3, 8])
def test_capped_is_the_beginning_of_uncapped(cfg: Any, tmp_path: Path, cap: int) -> None:
    """Identity 2 of prefixes."""

    async def script(acting: Any) -> Any:
        return await ask(acting, PROMPTS, 2, replace(DRAW, max_positions=40)), await ask(
            acting, PROMPTS, 2, replace(DRAW, max_positions=cap)
        )

    whole, cut = sampled(cfg, tmp_path / "run", script)
    for long, short in zip((a for g in whole for a in g), (a for g in cut for a in g), strict=True):
        assert short.rollout.tokens_T.tolist() == long.rollout.tokens_T[:cap].tolist()
        assert short.rollout.finish == (long.rollout.finish if long.rollout.length <= cap else "length")
    assert {a.rollout.finish for g in cut for a in g} >= {"length"}


def test_small_batches_change_no_token(student: str, teacher: str, tmp_path: Path) -> None:
    found = []
    for budget in (1, 60, 32768):
        cfg = tiny.config(
            "opd", student, teacher, task={"kind": "outside:Chat"}, sampler__batch_tokens=budget
        )
        found.append(sampled(cfg, tmp_path / str(budget), lambda acting: ask(acting, PROMPTS, 2, DRAW)))
    one, *others = [list(map(tokens, groups)) for groups in found]
    assert all(other == one for other in others)


# --- the noise itself


def test_noise_is_a_function_of_key_position_and_token() -> None:
    keys = torch.tensor([row_key(0, "train", step, "p", 0) for step in range(4)])
    positions = torch.tensor([0, 5, 5, 9])
    whole = gumbel(keys, positions, 50)
    assert torch.equal(whole[:, :20], gumbel(keys, positions, 20))
    assert torch.equal(whole[[2, 0]], gumbel(keys[[2, 0]], positions[[2, 0]], 50))
    assert whole.isfinite().all()
    assert len(whole.unique()) > 190


def test_noise_is_gumbel_and_uncorrelated() -> None:
    keys = torch.tensor([row_key(0, "train", 0, f"p{i}", 0) for i in range(200)])
    by_position = torch.stack([gumbel(keys, torch.full_like(keys, t), 64) for t in range(3)]).numpy()
    assert stats.kstest(by_position.ravel(), stats.gumbel_r.cdf).pvalue > 1e-3
    for axis in range(3):
        one, other = (
            by_position.take(range(s, by_position.shape[axis] - 1 + s), axis).ravel() for s in (0, 1)
        )
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(len(one))


def test_every_bit_of_a_key_changes_every_bit_of_the_noise() -> None:
    """Avalanche: flipping one of the key's 63 bits flips half of the bits of the uniforms, within the
    sampling error of 2,048 trials.
    """
    flipped = torch.tensor(
        [0x1234_5678_9ABC_DEF0, *(0x1234_5678_9ABC_DEF0 ^ (1 << bit) for bit in range(63))]
    )
    uniform = torch.exp(-torch.exp(-gumbel(flipped, torch.full_like(flipped, 3), 512).double()))
    bits = (uniform * 16).long()[..., None] >> torch.arange(4) & 1
    # per key bit and noise bit
    share = (bits[1:] != bits[0]).double().mean(1)
    assert share.min() > 0.38
    assert share.max() < 0.62


def test_parts_have_their_own_rng() -> None:
    step_context = StepContext(3, seed=7)
    assert step_context.rng("a").random() == step_context.rng("a").random()
    others = [
        step_context.rng("b"),
        StepContext(4, 7).rng("a"),
        StepContext(3, 8).rng("a"),
        step_context.rng("a", 1),
    ]
    assert step_context.rng("a").random() not in [rng.random() for rng in others]
