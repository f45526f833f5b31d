"""What is asked for one step becomes one batched model call.

Groups run as independent coroutines; in-process models want batches, and batch composition must not depend on timing (padding alone
changes logits in the sixth digit). So the requests of one cohort wait for one another and are answered by one call, in a fixed order.

Consumes: single requests, each naming its cohort and its place in it. Produces: one answer per request. Waits for: the whole cohort.
A request that is cancelled leaves the cohort; the call in progress is finished, never interrupted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Gather(Generic[Item, Answer]):
    """`answer(items)` is called once per cohort, with its items in order of their place; one cohort at a time."""

    def __init__(self, answer: Callable[[list[Item]], Awaitable[Sequence[Answer]]]):
        self._answer = answer
        self._cohorts: dict[Hashable, list[_Request[Item, Answer]]] = {}
        self._turn = asyncio.Lock()
        self._calls: set[asyncio.Task[None]] = set()  # the loop itself keeps no strong reference

    async def ask(self, cohort: Hashable, size: int, place: str, item: Item) -> Answer:
        """Wait for the `size` requests of `cohort`, then for this one's answer. `place` orders the call: same places, same batch."""
        request = _Request(place, item, asyncio.get_running_loop().create_future())
        waiting = self._cohorts.setdefault(cohort, [])
        waiting.append(request)
        if len(waiting) == size:
            del self._cohorts[cohort]
            call = asyncio.ensure_future(self._run(sorted(waiting, key=lambda request: request.place)))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        try:
            return await request.future
        except asyncio.CancelledError:
            if request in waiting:
                waiting.remove(request)
            raise

    async def _run(self, requests: list[_Request[Item, Answer]]) -> None:
        try:
            async with self._turn:
                wanted = [request for request in requests if not request.future.done()]
                answers = await self._answer([request.item for request in wanted]) if wanted else []
            answered = list(zip(wanted, answers, strict=True))
        except BaseException as error:
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(error)
            return
        for request, answer in answered:
            if not request.future.done():
                request.future.set_result(answer)


@dataclass(eq=False)
class _Request(Generic[Item, Answer]):
    place: str
    item: Item
    future: asyncio.Future[Answer]
