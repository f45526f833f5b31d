"""What the tasks `shopping`, `calculator` and `ledger` share: an environment that replies to each turn of the
student, and problems that are drawn from the number in the id of their prompt.

The replies are made by a `Game`, which is pure. So the replies to the same turns at another step of the run
are known without waiting (`ToolTask.replay`). A fault of the student, such as a call that cannot be read, is
answered by a reply that begins with "Error:".
"""

from __future__ import annotations

import asyncio
import random
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import seed_of
from reflux.rollouts.environment import Environment, Observation
from reflux.tasks.base import Split
from reflux.tasks.generated import TRIES, GeneratedTask, split_of
from reflux.types import Message, Prompt

CALL = re.compile(r"([a-z]+)\(([^()]*)\)")
# The text with which the student ends an attempt.
END = "Answer:"
MOST_CALLS = 6
MOST_TURNS = 10


class Game(Protocol):
    def reply(self, text: str) -> str | None:
        """The reply to the student's next turn; None if the attempt ends with this turn."""
        ...


@dataclass(frozen=True, config=STRICT)
class ToolTask(GeneratedTask):
    """The base class of tasks with a tool. Subclasses define what a problem is, and how it is asked, answered
    and solved.

    Problem number p of a split depends on (split, seed, p) alone. The id of a prompt ends with the number
    from which its problem is drawn, so an environment knows what the student does not see. ValueError for a
    prompt of another task, and where the settings allow too few problems.
    """

    # seconds before each reply, to measure what a slow tool costs
    delay_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @property
    def multi_turn(self) -> bool:
        return True

    @property
    def replays(self) -> bool:
        return True

    @property
    def routes(self) -> frozenset[str | None]:
        return frozenset([None])

    def open_env(self, prompt: Prompt, step: int) -> Environment:
        return ToolEnvironment(self.game(self.problem(prompt), step), self.delay_s)

    def replay(self, prompt: Prompt, turns: Sequence[Message], step: int) -> list[tuple[Message, ...]]:
        game = self.game(self.problem(prompt), step)
        return [_messages(game.reply(turn["content"])) for turn in turns]

    def worked(self, prompt: Prompt, step: int) -> list[str]:
        """The turns of a right attempt that begins at this step: each follows from the replies before it."""
        problem, replies, turns = self.problem(prompt), list[str](), list[str]()
        game = self.game(problem, step)
        while True:
            turns.append(self.turn(problem, replies))
            reply = game.reply(turns[-1])
            if reply is None:
                return turns
            replies.append(reply)

    def problem(self, prompt: Prompt) -> Any:
        """The problem of a prompt, from the number in its id."""
        number = prompt.id.rpartition("-")[2]
        if not re.fullmatch("[0-9a-f]{16}", number):
            raise ValueError(f"prompt {prompt.id} is not one of the task '{self.kind}'")
        return self.draw(random.Random(int(number, 16)))

    @abstractmethod
    def draw(self, rng: random.Random) -> Any:
        """A random problem, whose repr decides its split; None if this draw gives none."""

    @abstractmethod
    def ask(self, problem: Any) -> tuple[str, str]:
        """The question, and what `verify` compares with."""

    @abstractmethod
    def game(self, problem: Any, step: int) -> Game:
        """What replies in an attempt that begins after `step` completed optimiser steps."""

    @abstractmethod
    def turn(self, problem: Any, replies: Sequence[str]) -> str:
        """The next turn of a right attempt that got these replies."""

    def draw_prompt(self, split: Split, seed: int, position: int) -> Prompt:
        for attempt in range(TRIES):
            number = seed_of(self.kind, split, seed, position, attempt)
            problem = self.draw(random.Random(number))
            if problem is not None and split_of(problem) == split:
                question, answer = self.ask(problem)
                messages = ({"role": "user", "content": question},)
                return Prompt(f"{split}-{position}-{number:016x}", messages, answer)
        raise ValueError(f"{self.kind}: these settings allow too few different problems for '{split}'")


class ToolEnvironment:
    """Replies as its game does, after `delay_s` seconds."""

    def __init__(self, game: Game, delay_s: float):
        self._game, self._delay_s = game, delay_s

    async def step(self, message: Message) -> Observation:
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        messages = _messages(self._game.reply(message["content"]))
        return Observation(messages, done=not messages)

    async def close(self) -> None:
        """Nothing to close: no process and no connection was opened."""


class Calls:
    """The game in which each turn of the student has one call, NAME(ARGUMENT), until it gives an answer.

    tools: by name, the function that gives the reply to an argument. form: a call as an example. The attempt
    ends with a turn that has "Answer:", and with turn number 10. More than 6 calls get an error.
    """

    def __init__(self, tools: dict[str, Callable[[str], str]], form: str):
        self.tools, self.form = tools, form
        self.turns = self.calls = 0

    def reply(self, text: str) -> str | None:
        self.turns += 1
        if END in text or self.turns == MOST_TURNS:
            return None
        call = the_call(text)
        if call is None or call[0] not in self.tools:
            return f"Error: write one {self.form}"
        if self.calls == MOST_CALLS:
            return "Error: no calls left"
        self.calls += 1
        return self.tools[call[0]](call[1])


def the_call(text: str) -> tuple[str, str] | None:
    """(name, argument) of the call in a text; None without a call, and for several."""
    found = CALL.findall(text)
    return found[0] if len(found) == 1 else None


def _messages(reply: str | None) -> tuple[Message, ...]:
    return () if reply is None else ({"role": "user", "content": reply},)
