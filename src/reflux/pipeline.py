"""Bounded-lag production of groups. max_lag = 0 is the synchronous loop.

Consumes: prompts, in order. Produces: for each optimiser step, its groups in prompt order. Waits for: every attempt of that step. Unblocked
by: its consumer coming back for the next step, which is exactly when new weights are out, so back-pressure needs no lock and no queue.
Shutdown: closing the iterator cancels what is in flight. An exception of an attempt surfaces at the yield of its step.

At the moment step s is produced, attempts meant for steps up to s + max_lag have been started: their lag when consumed is at most max_lag.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import islice

from reflux.types import Group, Prompt

Attempting = Callable[[Prompt, int], Awaitable[Group]]


class Pipeline:
    """`async for groups in Pipeline(...)`: `steps` times a list of `per_step` groups. first_step is the step of the first one."""

    def __init__(self, prompts: Iterator[Prompt], attempt: Attempting, *, first_step: int, steps: int, per_step: int, max_lag: int):
        self._prompts, self._attempt = prompts, attempt
        self._next, self._last = first_step, first_step + steps
        self._per_step, self._max_lag = per_step, max_lag
        self._asked: dict[int, list[Prompt]] = {}  # prompts by step, kept until the step is consumed
        self._flying: dict[int, list[asyncio.Task[Group]]] = {}
        self._dropped: list[asyncio.Task[Group]] = []

    async def __aiter__(self) -> AsyncIterator[list[Group]]:
        try:
            while self._next < self._last:
                await self._clear_dropped()
                self._start(upto=min(self._next + self._max_lag, self._last - 1))
                groups = await self._landed(self._next)
                self._asked.pop(self._next)
                self._next += 1
                yield groups
        finally:
            self.refresh()
            await self._clear_dropped()

    def _start(self, upto: int) -> None:
        for step in range(self._next, upto + 1):
            if step not in self._asked:
                self._asked[step] = self._take()
            if step not in self._flying:
                self._flying[step] = [asyncio.ensure_future(self._attempt(prompt, step)) for prompt in self._asked[step]]

    def _take(self) -> list[Prompt]:
        prompts = list(islice(self._prompts, self._per_step))
        if len(prompts) < self._per_step:
            raise ValueError(
                f"the task gave {len(prompts)} more training prompts where {self._per_step} were asked for; training prompts must not end"
            )
        return prompts

    async def _landed(self, step: int) -> list[Group]:
        tasks = self._flying[step]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task in done and task.exception() is not None:
                await task
        del self._flying[step]
        return [task.result() for task in tasks]

    async def settle(self) -> None:
        """In-flight attempts finish; none is started before the consumer asks for the next step."""
        await asyncio.gather(*(task for tasks in self._flying.values() for task in tasks), return_exceptions=True)

    def refresh(self) -> None:
        """Throw away what is in flight; its prompts are asked again, under the weights of then, when the consumer comes back."""
        for tasks in self._flying.values():
            for task in tasks:
                task.cancel()
                self._dropped.append(task)
        self._flying.clear()

    @property
    def in_flight(self) -> int:
        return sum(not task.done() for tasks in self._flying.values() for task in tasks)

    async def _clear_dropped(self) -> None:
        """A dropped attempt is gone before its prompt is asked again, or the two would meet in one batch."""
        dropped, self._dropped = self._dropped, []
        await asyncio.gather(*dropped, return_exceptions=True)
