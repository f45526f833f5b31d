"""What the tests on a real vLLM server share: attempts, models with other weights, and processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contract.test_vllm_sampler import at, logp_of
from engines.conftest import Real, own_net
from reflux.config.step_context import SamplingParams
from reflux.tasks.word_problems import WordProblems
from reflux.types import Prompt, TokenRollout

DRAW = SamplingParams(3, "train", 64)
# Float32 on both sides; the largest difference that was measured is 2e-5.
CLOSE = {"atol": 1e-4, "rtol": 0.0}


def prompts(number: int = 4) -> list[Prompt]:
    found = WordProblems().prompts("train", 0)
    return [next(found) for _ in range(number)]


async def sample(real: Real, draw: SamplingParams = DRAW, n: int = 3) -> list[TokenRollout]:
    groups = await asyncio.gather(*(real.sampler.sample(prompt, n, draw) for prompt in prompts()))
    return [attempt.rollout for group in groups for attempt in group]


def agree(real: Real, rollouts: list[TokenRollout]) -> None:
    """The log-probs at temperature 1 are those of the net."""
    assert sum(rollout.length for rollout in rollouts) > 50
    for rollout in rollouts:
        np.testing.assert_allclose(
            rollout.policy_logp_T, at(logp_of(real.net, rollout), rollout.tokens_T), **CLOSE
        )


def moved(seed: int, model: str = "reflux:student") -> Any:
    net = own_net(model)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.2 * value.abs().mean() * torch.randn(value.shape, generator=rng))
    return net


def group_of(pid: int) -> list[int]:
    """The processes of a group that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def process_of(pid: int, words: str) -> int:
    """The process of a group whose command line has these words."""
    named = {one: Path(f"/proc/{one}/cmdline").read_text().replace("\0", " ") for one in group_of(pid)}
    (found,) = [one for one, told in named.items() if words in told]
    return found
