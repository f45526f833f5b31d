"""Tasks that stand and fall together: once one fails, or is cancelled, the others are cancelled.

asyncio.TaskGroup does neither of two things that are needed here: it goes on where one of its tasks is
cancelled, and it can be waited for only by the block that opened it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Siblings(Generic[Result]):
    """Started at once. Since a failure cancels the rest, `ended` is never later than the slowest of them
    takes to end.
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
        """All are gone, with or without a result."""
        if self.tasks:
            await asyncio.wait(self.tasks)

    async def results(self) -> list[Result]:
        """In order, once all are gone. Raises the error of the first in order that has one, else
        CancelledError where one was cancelled.
        """
        await self.ended()
        self.raise_error()
        return [task.result() for task in self.tasks]

    def raise_error(self) -> None:
        """A cancellation is none: that of a sibling never hides the error behind it."""
        for task in self.tasks:
            if not task.cancelled() and (error := task.exception()):
                raise error


async def together(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results in order, or the error of the first that has one; nothing is left of them when this returns
    or raises, also where it is cancelled. One alone is simply awaited."""
    coroutines = list(work)
    if len(coroutines) == 1:
        return [await coroutines[0]]
    siblings = Siblings(coroutines)
    try:
        return await siblings.results()
    finally:
        siblings.cancel()
        await siblings.ended()


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None
