"""The environment of a task: what tools or a user answer to the student's turn.

`task.open_env(prompt)` opens one for each attempt, or gives None where the task is answered in one turn. Environments run beside each other
in the event loop, so `step` must not block it: slow work belongs in `asyncio.to_thread`, or in another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from reflux.errors import RefluxError
from reflux.types import Message


class ToolError(RefluxError):
    """A tool failed in a way that is not the student's fault. The attempt ends with finish "tool_error" and gets no verdict."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment answers to one turn. No messages, or `done`, end the attempt; messages of a `done` one are kept in no prompt."""

    messages: tuple[Message, ...] = ()
    done: bool = False
    # The environment's own verdict on the turn; those of an attempt are added up.
    reward: float | None = None


class Environment(Protocol):
    async def step(self, message: Message) -> Observation:
        """The answer to the student's turn. Raises ToolError where a tool failed."""
        ...

    async def close(self) -> None:
        """Called once for each open environment, however its attempt ended."""
        ...
