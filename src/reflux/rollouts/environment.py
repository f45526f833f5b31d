"""The environment of a task: the answers of tools or of a user to the student's turns.

`task.open_env(prompt, step)` opens one environment for each attempt, or returns None if the prompt is
answered in one turn. All environments of a cohort (the groups of one optimiser step that are requested
together) are opened before the cohort's first turn, so opening must be fast. Slow work, such as starting a
sandbox, belongs in the first `step`. Environments run concurrently in the event loop, so `step` must not
block it. Blocking work belongs in `asyncio.to_thread` or in another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from reflux.errors import RefluxError
from reflux.types import Message, Prompt


class ToolError(RefluxError):
    """A tool failed for a reason that is not the student's fault. The attempt ends with finish "tool_error"
    and gets no verdict.

    For a fault of the student, such as a call that cannot be parsed, return a message to it, or a reward. The
    text of the error is reported to the user.
    """


@dataclass(frozen=True, slots=True)
class Observation:
    """The answer of an environment to one turn. An answer without messages, or with `done`, ends the attempt.
    Messages of an answer with `done` are not kept.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    # The environment's own reward for the turn. The rewards of an attempt are added up.
    reward: float | None = None


class Opens(Protocol):
    """The members of a task that open environments."""

    @property
    def multi_turn(self) -> bool: ...

    def open_env(self, prompt: Prompt, step: int) -> Environment | None: ...


class Environment(Protocol):
    async def step(self, message: Message) -> Observation:
        """The answer to a turn that the student ended, including the last turn that `max_turns` allows. The
        environment may keep and change `message`.

        It is not called for a turn that the length limit cut. Raises ToolError if a tool failed; any other
        exception ends the run. A step that takes longer than the sampler's `environment_timeout_s` is
        cancelled, and the attempt has finish "timeout".
        """
        ...

    async def close(self) -> None:
        """Called once for each open environment, whatever ended its attempt, with the same time limit. No
        step is running then.
        """
        ...
