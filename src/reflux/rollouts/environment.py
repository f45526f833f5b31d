"""The environment of a task: what tools or a user answer to the student's turn.

`task.open_env(prompt)` opens one for each attempt, or gives None where the prompt is answered in one turn.
All those of a cohort are opened before its first turn, so opening is cheap: what takes time, such as starting
a sandbox, belongs in the first `step`. Environments run beside each other in the event loop, so `step` must
not block it: slow work belongs in `asyncio.to_thread`, or in another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from reflux.errors import RefluxError
from reflux.types import Message, Prompt


class ToolError(RefluxError):
    """A tool failed in a way that is not the student's fault. The attempt ends with finish "tool_error" and
    gets no verdict.

    What is the student's fault, such as a call that cannot be read, is a message to it, or a reward. Its text
    is told to the user.
    """


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment answers to one turn. No messages, or `done`, end the attempt; messages of a `done`
    one are kept nowhere.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    # The environment's own verdict on the turn; those of an attempt are added up.
    reward: float | None = None


class Opens(Protocol):
    """The members of a task that open environments."""

    @property
    def multi_turn(self) -> bool: ...

    def open_env(self, prompt: Prompt) -> Environment | None: ...


class Environment(Protocol):
    async def step(self, message: Message) -> Observation:
        """The answer to a turn that the student ended, also to the last one that `max_turns` allows.
        `message` is the environment's own.

        A turn that the length limit cut is never asked about. Raises ToolError where a tool failed; any other
        exception ends the run. A step that takes longer than the sampler's `environment_timeout_s` is
        cancelled, and the attempt has finish "timeout".
        """
        ...

    async def close(self) -> None:
        """Called once for each open environment, however its attempt ended, with the same limit of time. No
        step is at work then.
        """
        ...
