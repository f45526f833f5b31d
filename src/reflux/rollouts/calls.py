"""The driver's calls to environments. They have a time limit, each environment is closed once, and the first
failure of each kind is reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from reflux.errors import ConfigError
from reflux.rollouts.environment import Environment, Observation, Opens, ToolError
from reflux.runtime.services import Listener
from reflux.runtime.timers import Clock
from reflux.types import Finish, Message, Prompt

# Characters of a tool's error text that are kept.
_LONGEST = 500

Open = Callable[[Prompt, int], Environment | None]


class EnvironmentCalls:
    """The environment calls of one sampler, for the driver. timeout_s: the time limit of one `step`, and of
    one `close`, in seconds.
    """

    def __init__(self, task: Opens, timeout_s: float, listener: Listener, clock: Clock):
        self.task, self.timeout_s, self.listener, self.clock = task, timeout_s, listener, clock
        self._told: set[str] = set()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Open]:
        """Yield a function that opens an environment for one attempt. All opened environments are closed at
        the end, also after an exception.

        If the body of the `with` block and a later `close` both raise errors, the error of the body is
        raised.
        """
        environments: list[Environment] = []

        def open_env(prompt: Prompt, step: int) -> Environment | None:
            environment = self.task.open_env(prompt, step)
            if environment is None:
                return None
            environments.append(environment)
            if not self.task.multi_turn:
                raise ConfigError(
                    f"the task opened an environment for prompt {prompt.id}, but its property multi_turn is "
                    "False. Make multi_turn True: checks and rewards rely on it."
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
        """The environment's answer to the student's turn `message`, or the finish of the attempt if there is
        no answer. All exceptions of the environment are raised, except ToolError.
        """
        limit = asyncio.timeout(self.timeout_s)
        try:
            with self.clock.span("environments", "environment", group=prompt.key):
                async with limit:
                    return await environment.step(message)
        except TimeoutError:
            # A TimeoutError of the environment itself is not the limit of this call.
            if not limit.expired():
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
        """Close all environments at the same time, and finish even if this task is cancelled meanwhile.
        Returns the errors, in order.
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
                "close", f"An environment did not close within {self.timeout_s:g} s and was abandoned."
            )
        except ToolError as error:
            self._tell("close", f"An environment did not close: {_words(error)}.")

    def _tell(self, kind: str, sentence: str) -> None:
        """Report the first failure of its kind. The metrics count the others."""
        if kind not in self._told:
            self._told.add(kind)
            rest = (
                ""
                if kind == "close"
                else f" The attempt ends there and gets no verdict. metrics.jsonl counts such ends as {kind}."
            )
            self.listener.noted(sentence + rest)


def _words(error: ToolError) -> str:
    """The error text of a tool, as data: on one line, without control characters, and of limited length."""
    return (
        "".join(letter if letter.isprintable() else " " for letter in str(error)[:_LONGEST]).rstrip(". ")
        or "it gave no reason"
    )


async def ended(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Wait until all tasks are done. A cancellation that arrives meanwhile is raised afterwards, so that no
    task is left running.
    """
    cancelled: asyncio.CancelledError | None = None
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
