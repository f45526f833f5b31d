"""Bounded-staleness production of groups. max_staleness = 0 is the synchronous loop.

Consumes: prompts, in order. Produces: for each optimiser step, its groups in prompt order. Waits for: every
attempt of that step. Unblocked by: its consumer coming back for the next step, which is exactly when new
weights are out, so back-pressure needs no lock and no queue. Shutdown: `aclose` cancels what is in flight and
waits until it is gone.

An attempt that raises or is cancelled cancels the others of its step. Its error surfaces where that step
would have been produced, also where the consumer settles or refreshes in between. Of several errors of one
step the first in prompt order is raised.

At the moment step s is produced, attempts meant for steps up to s + max_staleness have been started: their
staleness when consumed is at most max_staleness.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from itertools import islice
from typing import Any, Self

from reflux.runtime.together import Siblings
from reflux.types import Group, Prompt

Attempting = Callable[[Prompt, int], Coroutine[Any, Any, Group]]


class Pipeline:
    """An async iterator that gives `steps` times a list of `per_step` groups. first_step is the step of the
    first one.

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
        self._per_step, self._max_lag = per_step, max_staleness
        # prompts by step, kept until the step is consumed
        self._asked: dict[int, list[Prompt]] = {}
        self._flying: dict[int, Siblings[Group]] = {}
        self._dropped: list[Siblings[Group]] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Group]:
        if self._next >= self._last:
            raise StopAsyncIteration
        await self._clear_dropped()
        self._start(upto=min(self._next + self._max_lag, self._last - 1))
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
                f"the task gave {len(prompts)} more training prompts where {self._per_step} were asked for; "
                "training prompts must not end"
            )
        return prompts

    async def settle(self) -> None:
        """In-flight attempts end; none is started before the consumer asks for the next step."""
        for attempts in self._flying.values():
            await attempts.ended()

    def refresh(self) -> None:
        """Throw away what is in flight; its prompts are asked again, under the weights of then, when the
        consumer comes back.

        A step that has failed stays as it is: its error surfaces when its turn comes.
        """
        for step in [step for step, attempts in self._flying.items() if not attempts.failed]:
            attempts = self._flying.pop(step)
            attempts.cancel()
            self._dropped.append(attempts)

    @property
    def in_flight(self) -> int:
        return sum(not task.done() for attempts in self._flying.values() for task in attempts.tasks)

    async def _clear_dropped(self) -> None:
        """A dropped attempt is gone before its prompt is asked again, or the two would meet in one batch."""
        while self._dropped:
            await self._dropped[0].ended()
            # one that failed while it was being cancelled
            self._dropped.pop(0).raise_error()

    async def aclose(self) -> None:
        """Nothing is in flight afterwards. May be called twice."""
        alive = [*self._dropped, *self._flying.values()]
        for attempts in alive:
            attempts.cancel()
        for attempts in alive:
            await attempts.ended()
        self._next = self._last
