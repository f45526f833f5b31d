"""Attempts whose turns are written by a script. The driver, the tokenizer and the environments are the real
ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.models.turns import Turn, TurnRequest
from reflux.rollouts.driver import Driver, Limits
from reflux.types import Prompt, TokenRollout

TOKENIZER = character_tokenizer()
ASSISTANT = TOKENIZER.convert_tokens_to_ids("<assistant>")


@dataclass
class Writer:
    """`write(number)` is the student's turn with this number, from 0. A turn longer than what is left is cut.
    k: of the listed tokens, where some are wanted.
    """

    write: Callable[[int], str]

    async def generate(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        return [self._turn(request) for request in requests]

    def _turn(self, request: TurnRequest) -> Turn:
        ids = TOKENIZER(self.write(request.ids.count(ASSISTANT) - 1))["input_ids"] + [tiny.END]
        cut = len(ids) > request.max_tokens
        ids, k = ids[: request.max_tokens], request.top_k
        logp_T = np.full(len(ids), -0.5, np.float32)
        listed = None
        if k:
            listed = (np.tile(np.arange(k), (len(ids), 1)), np.full((len(ids), k), -4.0, np.float32))
        return Turn(ids, logp_T, logp_T, listed, np.zeros(len(ids), int), "length" if cut else "stop")


def played(
    task: Any,
    prompt: Prompt,
    write: Sequence[str] | Callable[[int], str],
    step: int = 0,
    *,
    tokens: int = 400,
    requirements: Requirements = Requirements(),
    **limits: Any,
) -> TokenRollout:
    """One attempt that begins after `step` completed optimiser steps."""
    writer = Writer(write if callable(write) else lambda number: write[number])
    context = tiny.context(requirements, task=task)
    driver = Driver(writer, TOKENIZER, [tiny.END], context, Limits(512, **limits))
    draw = SamplingParams(0, "train", tokens, completed=step)
    rollout = asyncio.run(driver.play([(prompt, 1, draw)], 0))[0][0].rollout
    assert isinstance(rollout, TokenRollout)
    return rollout


def replies(rollout: TokenRollout) -> list[str]:
    """What the environment said, in order."""
    said = rollout.messages[len(rollout.prompt.messages) :]
    return [message["content"] for message in said if message["role"] == "user"]
