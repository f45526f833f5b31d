"""Produce groups of attempts with bounded staleness. max_staleness = 0 is the synchronous loop.

Consumes: prompts, in order. Produces: for each optimiser step, its groups in prompt order. A prompt that
occurs several times in a step is numbered (`occurrences.py`). Waits for: every attempt of that step. New
attempts are started when the consumer asks for the next step. At that time the new weights are published, so
no lock and no queue is needed. Shutdown: `aclose` cancels the attempts in flight and waits until they have
ended.

An attempt that raises or is cancelled cancels the other attempts of its step. Its error is raised when the
consumer asks for that step, also after a `settle` or a `refresh` in between. If several attempts of one step
raise, the first error in prompt order is raised.

When step s is produced, attempts for the steps up to s + max_staleness have been started. So the staleness of
an attempt when it is consumed is at most max_staleness.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from itertools import islice
from typing import Any, Self

from reflux.runtime.occurrences import numbered
from reflux.runtime.together import Siblings
from reflux.types import Group, Prompt

Attempting = Callable[[Prompt, int], Coroutine[Any, Any, Group]]


class Pipeline:
    """An async iterator that yields `steps` lists of `per_step` groups each. prompts: the training prompts,
    in order. attempt(prompt, step): makes the group of one prompt. first_step: the optimiser step of the
    first list (from 0). max_staleness: the bound described above.

    async with aclosing(Pipeline(...)) as stream:
        async for groups in stream: ...
    """

    def __init__(
        self,
        prompts: Iterator[Prompt],
        attempt: Attempting,
        *,
        first_step: int,
        steps: int,
        per_step: int,
        max_staleness: int,
    ):
        self._prompts, self._attempt = prompts, attempt
        self._next, self._last = first_step, first_step + steps
        self._per_step, self._max_staleness = per_step, max_staleness
        # the prompts of each step, kept until the step is consumed
        self._asked: dict[int, list[Prompt]] = {}
        self._flying: dict[int, Siblings[Group]] = {}
        self._dropped: list[Siblings[Group]] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Group]:
        if self._next >= self._last:
            raise StopAsyncIteration
        await self._clear_dropped()
        self._start(upto=min(self._next + self._max_staleness, self._last - 1))
        groups = await self._flying[self._next].results()
        del self._flying[self._next], self._asked[self._next]
        self._next += 1
        return groups

    def _start(self, upto: int) -> None:
        for step in range(self._next, upto + 1):
            if step not in self._asked:
                self._asked[step] = self._take()
            if step not in self._flying:
                self._flying[step] = Siblings(self._attempt(prompt, step) for prompt in self._asked[step])

    def _take(self) -> list[Prompt]:
        prompts = list(islice(self._prompts, self._per_step))
        if len(prompts) < self._per_step:
            raise ValueError(
                f"the task gave only {len(prompts)} more training prompts, but a step needs "
                f"{self._per_step}. The iterator of training prompts must not end."
            )
        return numbered(prompts)

    async def settle(self) -> None:
        """Wait until all running attempts have ended. No attempt is started until the consumer asks for the
        next step.
        """
        for attempts in self._flying.values():
            await attempts.ended()

    def refresh(self) -> None:
        """Discard the attempts that are started or finished for later steps. When the consumer asks for the
        next step, their prompts are sampled again with the weights of that moment.

        A step that has failed is kept, and its error is raised when the consumer asks for that step.
        """
        for step in [step for step, attempts in self._flying.items() if not attempts.failed]:
            attempts = self._flying.pop(step)
            attempts.cancel()
            self._dropped.append(attempts)

    @property
    def in_flight(self) -> int:
        return sum(not task.done() for attempts in self._flying.values() for task in attempts.tasks)

    async def _clear_dropped(self) -> None:
        """Wait until the dropped attempts have ended. Otherwise an old and a new attempt at the same
        prompt could be in one batch.
        """
        while self._dropped:
            await self._dropped[0].ended()
            # raises if an attempt failed while it was being cancelled
            self._dropped.pop(0).raise_error()

    async def aclose(self) -> None:
        """Cancel all running attempts and wait until they have ended. May be called twice."""
        alive = [*self._dropped, *self._flying.values()]
        for attempts in alive:
            attempts.cancel()
        for attempts in alive:
            await attempts.ended()
        self._next = self._last
