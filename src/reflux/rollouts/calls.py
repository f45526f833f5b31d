"""Environments as the driver asks them: within a limit of time, closed once, and the first failure of each
kind is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from reflux.errors import ConfigError
from reflux.rollouts.environment import Environment, Observation, Opens, ToolError
from reflux.runtime.services import Listener
from reflux.types import Finish, Message, Prompt

# characters of a tool's own words
_LONGEST = 500

Open = Callable[[Prompt], Environment | None]


class EnvironmentCalls:
    """Those of one sampler. timeout_s: of one `step`, and of one `close`."""

    def __init__(self, task: Opens, timeout_s: float, listener: Listener):
        self.task, self.timeout_s, self.listener = task, timeout_s, listener
        self._told: set[str] = set()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Open]:
        """Gives what opens an environment for one attempt. All that were opened are closed at the end,
        whatever ends it.

        An error of the block is raised rather than one of a `close` after it.
        """
        environments: list[Environment] = []

        def open_env(prompt: Prompt) -> Environment | None:
            environment = self.task.open_env(prompt)
            if environment is None:
                return None
            environments.append(environment)
            if not self.task.multi_turn:
                raise ConfigError(
                    f"the task opened an environment for prompt {prompt.id}, and its property multi_turn "
                    "says that it never does. Make "
                    f"multi_turn true: checks and rewards rely on it."
                )
            return environment

        try:
            yield open_env
        except BaseException:
            await self._closed(environments)
            raise
        for error in await self._closed(environments):
            raise error

    async def step(self, environment: Environment, prompt: Prompt, message: Message) -> Observation | Finish:
        """What it answered, or how the attempt ends without an answer. Any other exception than ToolError is
        raised.
        """
        limit = asyncio.timeout(self.timeout_s)
        try:
            async with limit:
                return await environment.step(message)
        except TimeoutError:
            if not limit.expired():
                # the environment's own
                raise
            self._tell(
                "timeout",
                f"The environment of prompt {prompt.id} gave no answer within {self.timeout_s:g} s.",
            )
            return "timeout"
        except ToolError as error:
            self._tell("tool_error", f"A tool failed at prompt {prompt.id}: {_words(error)}.")
            return "tool_error"

    async def _closed(self, environments: Collection[Environment]) -> list[BaseException]:
        """Close each, all at once, and to the end also where this task is cancelled meanwhile. Gives the
        errors, in order.
        """
        closing = [asyncio.ensure_future(self._close(environment)) for environment in environments]
        await ended(closing)
        return [error for task in closing if not task.cancelled() and (error := task.exception())]

    async def _close(self, environment: Environment) -> None:
        limit = asyncio.timeout(self.timeout_s)
        try:
            async with limit:
                await environment.close()
        except TimeoutError:
            if not limit.expired():
                raise
            self._tell(
                "close", f"An environment did not close within {self.timeout_s:g} s, and was left as it was."
            )
        except ToolError as error:
            self._tell("close", f"An environment did not close: {_words(error)}.")

    def _tell(self, kind: str, sentence: str) -> None:
        """The first of its kind; the metrics count the others."""
        if kind not in self._told:
            self._told.add(kind)
            rest = (
                ""
                if kind == "close"
                else f" The attempt ends there and gets no verdict; metrics.jsonl counts such ends as {kind}."
            )
            self.listener.noted(sentence + rest)


def _words(error: ToolError) -> str:
    """What a tool wrote is data: in one line, without control characters, and not without end."""
    return (
        "".join(letter if letter.isprintable() else " " for letter in str(error)[:_LONGEST]).rstrip(". ")
        or "it gave no reason"
    )


async def ended(tasks: Collection[asyncio.Future[Any]]) -> None:
    """All are done. A cancellation that comes meanwhile is raised after that, so that nothing is left behind."""
    cancelled: asyncio.CancelledError | None = None
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
