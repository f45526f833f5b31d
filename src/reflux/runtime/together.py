"""Tasks that depend on each other: if one of them fails or is cancelled, the others are cancelled.

asyncio.TaskGroup is not used for two reasons: it does not cancel the other tasks if one task is cancelled,
and only the block that opened it can wait for its tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Siblings(Generic[Result]):
    """Asyncio tasks of which a failure or a cancellation cancels all others. All are started at once. `ended`
    waits for the slowest of them.
    """

    def __init__(self, work: Iterable[Coroutine[Any, Any, Result]]):
        self.tasks = [asyncio.create_task(each) for each in work]
        self._cancelled = False
        for task in self.tasks:
            task.add_done_callback(self._check)

    def _check(self, task: asyncio.Task[Result]) -> None:
        if _failed(task):
            self.cancel()

    def cancel(self) -> None:
        """Cancel all tasks, once. A second cancellation would interrupt a task that is cleaning up."""
        if not self._cancelled:
            self._cancelled = True
            for task in self.tasks:
                task.cancel()

    @property
    def failed(self) -> bool:
        return any(task.done() and _failed(task) for task in self.tasks)

    async def ended(self) -> None:
        """Wait until all tasks have ended, with or without a result."""
        if self.tasks:
            await asyncio.wait(self.tasks)

    async def results(self) -> list[Result]:
        """The results in order, after all tasks have ended. Raises the error of the first task that has one,
        else CancelledError if a task was cancelled.
        """
        await self.ended()
        self.raise_error()
        return [task.result() for task in self.tasks]

    def raise_error(self) -> None:
        """Raise the error of the first task that failed. A cancellation does not count as an error, so the
        cancellation of the other tasks does not hide the error that caused it.
        """
        for task in self.tasks:
            if not task.cancelled() and (error := task.exception()):
                raise error


async def together(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run coroutines concurrently and return the results in order. If some fail, the error of the first of
    them in order is raised. No task is still running when this function returns or raises, also after a
    cancellation. A single coroutine is awaited without a new task.
    """
    coroutines = list(work)
    if len(coroutines) == 1:
        return [await coroutines[0]]
    siblings = Siblings(coroutines)
    try:
        return await siblings.results()
    finally:
        siblings.cancel()
        await siblings.ended()


async def end_of(work: asyncio.Future[Any]) -> None:
    """Wait for the end of `work`, even if this task is cancelled meanwhile. Its error is not raised."""
    while not work.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([work])
    if not work.cancelled():
        # An error that nobody has looked at would be reported when `work` is deleted.
        work.exception()


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None
