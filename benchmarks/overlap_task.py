"""The task of `overlap.py`: a user who takes a while before each of three replies."""

from __future__ import annotations

import asyncio

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.rollouts.environment import Environment, Observation
from reflux.tasks.word_problems import WordProblems
from reflux.types import Message, Prompt

REPLIES = 3


@dataclass(frozen=True, config=STRICT)
class SlowUser(WordProblems):
    """Word problems; after each answer the user asks for the same again."""

    delay_s: float = 0.05

    @property
    def multi_turn(self) -> bool:
        return True

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        return Asking(prompt.messages[-1], self.delay_s)


class Asking:
    def __init__(self, question: Message, delay_s: float):
        self.question, self.delay_s, self.left = question, delay_s, REPLIES

    async def step(self, message: Message) -> Observation:
        await asyncio.sleep(self.delay_s)
        self.left -= 1
        return Observation((self.question,)) if self.left >= 0 else Observation(done=True)

    async def close(self) -> None: ...
