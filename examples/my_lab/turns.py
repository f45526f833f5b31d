"""A custom task with several turns: `kind = "my_lab.turns:Hinted"`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from my_lab.tasks import Backwards
from reflux.config.registry import STRICT
from reflux.rollouts.environment import Environment, Observation
from reflux.types import Message, Prompt


@dataclass(frozen=True, config=STRICT)
class Hinted(Backwards):
    """Like `Backwards`, but after a wrong word the environment gives a hint and the student can try again.
    Each hint shows one letter more.

    The reward is 1 / (1 + number of hints) for the right word, and 0 if the word after the last hint is
    wrong.
    """

    hints: Annotated[int, Field(ge=1)] = 2

    @property
    def multi_turn(self) -> bool:
        return True

    def open_env(self, prompt: Prompt, step: int) -> Environment:
        if prompt.answer is None:
            raise ValueError(f"prompt {prompt.id} has no answer, so there are no hints")
        return Hints(prompt.answer, self.hints)


class Hints:
    """The environment of one attempt."""

    def __init__(self, answer: str, most: int):
        self.answer, self.most, self.given = answer, most, 0

    async def step(self, message: Message) -> Observation:
        if message["content"].split()[-1:] == [self.answer]:
            return Observation(done=True, reward=1 / (1 + self.given))
        if self.given == self.most:
            return Observation(done=True, reward=0.0)
        self.given += 1
        return Observation(({"role": "user", "content": f"No. It begins with {self.answer[: self.given]}."},))

    async def close(self) -> None:
        """Nothing to close: the environment has no process and no connection."""
