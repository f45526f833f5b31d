"""What is asked for one step becomes one batched model call.

Groups run as independent coroutines; in-process models want batches, and batch composition must not depend on
timing (padding alone changes logits in the sixth digit). So the requests of one cohort wait for one another
and are answered by one call, in a fixed order.

Consumes: single requests, each naming its cohort and its place in it. Produces: one answer per request. Waits
for: the whole cohort. A request that is cancelled before its cohort is whole takes the others with it, for
their number is never reached: those that wait are cancelled, and so are those that come while the one that
left lives on. Where all of them were cancelled the cohort may be asked again. A request that is cancelled
later is gone when the call in progress has ended, for a model call is finished, never interrupted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Gather(Generic[Item, Answer]):
    """`answer(items)` is called once per cohort, with its items in order of their place; one cohort at a
    time.
    """

    def __init__(self, answer: Callable[[list[Item]], Awaitable[Sequence[Answer]]]):
        self._answer = answer
        self._cohorts: dict[Hashable, _Cohort[Item, Answer]] = {}
        self._turn = asyncio.Lock()

    async def ask(self, cohort: Hashable, size: int, place: str, item: Item) -> Answer:
        """Wait for the `size` requests of `cohort`, then for this one's answer. `place` orders the call: same
        places, same batch.

        CancelledError where another request of the cohort has left it.
        """
        joined = self._join(cohort)
        request = _Request(place, item, asyncio.get_running_loop().create_future())
        joined.requests.append(request)
        if len(joined.requests) == size:
            del self._cohorts[cohort]
            joined.call = asyncio.ensure_future(
                self._run(sorted(joined.requests, key=lambda request: request.place))
            )
        try:
            return await request.future
        except asyncio.CancelledError:
            if joined.call:
                await _end_of(joined.call)
            else:
                joined.leave(f"another request of the cohort {cohort} was cancelled")
            raise

    def _join(self, cohort: Hashable) -> _Cohort[Item, Answer]:
        joined = self._cohorts.setdefault(cohort, _Cohort())
        if joined.left_by is None:
            return joined
        if not joined.left_by.cancelled():
            raise asyncio.CancelledError(f"another request of the cohort {cohort} has left it")
        fresh = self._cohorts[cohort] = _Cohort()
        return fresh

    async def _run(self, requests: list[_Request[Item, Answer]]) -> None:
        try:
            async with self._turn:
                wanted = [request for request in requests if not request.future.done()]
                answers = await self._answer([request.item for request in wanted]) if wanted else []
            answered = list(zip(wanted, answers, strict=True))
        except Exception as error:
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(error)
            return
        except BaseException:
            for request in requests:
                request.future.cancel()
            raise
        for request, answer in answered:
            if not request.future.done():
                request.future.set_result(answer)


@dataclass(eq=False)
class _Request(Generic[Item, Answer]):
    place: str
    item: Item
    future: asyncio.Future[Answer]


@dataclass(eq=False)
class _Cohort(Generic[Item, Answer]):
    requests: list[_Request[Item, Answer]] = field(default_factory=list)
    # once it is whole
    call: asyncio.Task[None] | None = None
    # the first whose request was cancelled before
    left_by: asyncio.Task[Any] | None = None

    def leave(self, why: str) -> None:
        if self.left_by is None:
            self.left_by = asyncio.current_task()
            for request in self.requests:
                request.future.cancel(why)


async def _end_of(call: asyncio.Task[None]) -> None:
    """Wait for it, however often this task is cancelled meanwhile."""
    while not call.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([call])
