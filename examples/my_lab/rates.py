"""A custom task with a tool whose replies change during a run: `kind = "my_lab.rates:Rates"`."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import seed_of
from reflux.rollouts.environment import Environment, Observation
from reflux.tasks.base import Split, TaskPart
from reflux.types import Message, Prompt, Rollout, TokenRollout

CALL = re.compile(r"rate\((eur|usd|yen)\)")


@dataclass(frozen=True, config=STRICT)
class Rates(TaskPart):
    """What an amount is in crowns. The student asks for the rate of the currency by a call such as rate(eur)
    and then writes "Answer: N". The rates change after every `drift_every` optimiser steps.
    """

    drift_every: Annotated[int, Field(ge=1)] = 10
    held_out: int = 100
    weight: float = 1.0

    @property
    def rollouts(self) -> type[Rollout]:
        return TokenRollout

    @property
    def routes(self) -> frozenset[str | None]:
        return frozenset([None])

    @property
    def multi_turn(self) -> bool:
        return True

    @property
    def replays(self) -> bool:
        return True

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        position = start
        while split == "train" or position < self.held_out:
            rng = random.Random(seed_of("rates", split, seed, position))
            # Held-out amounts end with 0, and no amount of training does.
            amount = 10 * rng.randint(1, 9) + (rng.randint(1, 9) if split == "train" else 0)
            question = f"What are {amount} {rng.choice(['eur', 'usd', 'yen'])} in crowns? Ask rate(CODE)."
            yield Prompt(f"{split}-{position}", ({"role": "user", "content": question},), str(amount))
            position += 1

    def open_env(self, prompt: Prompt, step: int) -> Environment:
        return Desk(self, step)

    def replay(self, prompt: Prompt, turns: Sequence[Message], step: int) -> list[tuple[Message, ...]]:
        return [self.reply(turn, step) for turn in turns]

    def reply(self, turn: Message, step: int) -> tuple[Message, ...]:
        call = CALL.search(turn["content"])
        if call is None:
            return ({"role": "user", "content": "Ask rate(CODE)."},)
        return ({"role": "user", "content": str(2 + seed_of(call[1], step // self.drift_every) % 8)},)

    def evidence(self, rollout: Rollout) -> Any:
        return rollout.messages if isinstance(rollout, TokenRollout) else rollout.made

    def verify(self, prompt: Prompt, made: Any) -> float:
        if prompt.answer is None:
            raise ValueError(f"prompt {prompt.id} has no answer to compare with")
        code = prompt.messages[0]["content"].split()[3]
        told = [
            int(reply["content"])
            for turn, reply in pairwise(made)
            if turn["role"] == "assistant" and f"rate({code})" in turn["content"]
            if reply["role"] == "user" and reply["content"].isdecimal()
        ]
        return float(bool(told) and made[-1]["content"].endswith(f"Answer: {int(prompt.answer) * told[-1]}"))


class Desk:
    """The environment of one attempt: it keeps the rates with which the attempt began."""

    def __init__(self, task: Rates, step: int):
        self.task, self.began = task, step

    async def step(self, message: Message) -> Observation:
        if "Answer:" in message["content"]:
            return Observation(done=True)
        return Observation(self.task.reply(message, self.began))

    async def close(self) -> None:
        """Nothing to close: the environment has no process and no connection."""
