"""Collect the requests of one step into one batched model call.

Groups run as independent coroutines. Models in this process need batches, and the composition of a batch must
not depend on timing, because padding alone changes logits in the sixth digit. A cohort is the groups of one
optimiser step that are requested together, one request per group. The requests of one cohort wait for each
other and are answered by one call, in a fixed order.

Consumes: single requests, each with its cohort and its place in the cohort. Produces: one answer per request.
Waits for: all requests of the cohort.

If a request is cancelled before its cohort is complete, the cohort can never become complete. The waiting
requests are then cancelled, and so are later requests while the task of the cancelled request is
still running. When that task has been cancelled, the cohort may be requested again. If a request is cancelled
after the call has started, its cancellation waits for the end of the call. The call is cancelled when all its
requests are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from reflux.runtime.together import end_of

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Gather(Generic[Item, Answer]):
    """Call `answer(items)` once per cohort, with the items sorted by `place` (see `ask`). At most `at_once`
    cohorts are answered at the same time.
    """

    def __init__(self, answer: Callable[[list[Item]], Awaitable[Sequence[Answer]]], at_once: int = 1):
        self._answer = answer
        self._cohorts: dict[Hashable, _Cohort[Item, Answer]] = {}
        self._turn = asyncio.Semaphore(at_once)

    async def ask(self, cohort: Hashable, size: int, place: str, item: Item) -> Answer:
        """Wait until `cohort` has `size` requests, then return the answer to this request.

        cohort: a key that all requests of one call share. place: the sort key of this request within the
        call, which makes the order of the batch independent of timing. item: what `answer` gets for this
        request. Raises CancelledError if another request of the cohort was cancelled.
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
                if all(request.future.cancelled() for request in joined.requests):
                    joined.cancel()
                await end_of(joined.call)
            else:
                joined.leave(f"another request of the cohort {cohort} was cancelled")
            raise

    def _join(self, cohort: Hashable) -> _Cohort[Item, Answer]:
        joined = self._cohorts.setdefault(cohort, _Cohort())
        if joined.left_by is None:
            return joined
        if not joined.left_by.cancelled():
            raise asyncio.CancelledError(f"another request of the cohort {cohort} was cancelled")
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
    # the running call, once the cohort is complete
    call: asyncio.Task[None] | None = None
    # the task of the first request that was cancelled before the cohort was complete
    left_by: asyncio.Task[Any] | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Cancel the call, once. A second cancellation would interrupt a call that is cleaning up."""
        if self.call is not None and not self.cancelled:
            self.cancelled = True
            self.call.cancel()

    def leave(self, why: str) -> None:
        if self.left_by is None:
            self.left_by = asyncio.current_task()
            for request in self.requests:
                request.future.cancel(why)
