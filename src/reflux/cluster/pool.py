"""The actors of one part: each with what it has to do, and a new one in the place of one that ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from reflux.errors import ServerError
from reflux.runtime.together import together

if TYPE_CHECKING:
    from reflux.cluster.actors import Reply
    from reflux.cluster.base import Seat
    from reflux.runtime.services import Services

Result = TypeVar("Result")
# A call of an actor: it gives a reference to the result, which is awaited.
Call = Callable[[Any], Awaitable[Any]]
# The process of the actor ended, or its answer was lost with the machine that it was on.
_LOST = (RayActorError, OutOfMemoryError, ObjectLostError)
# Seconds that an actor has to close its part, such as a server that it started.
_CLOSING_S = 20.0


class Member:
    """One seat and the actor in it. outstanding: the size of the work that it has been given. ended: how many
    actors ended here since the last answer.
    """

    def __init__(self, seat: Seat, actor: Any):
        self.seat, self.actor = seat, actor
        self.outstanding, self.ended = 0, 0
        self.replacing = asyncio.Lock()

    @property
    def who(self) -> str:
        return f"{self.seat.group} actor {self.seat.index}"


class Pool:
    """start(seat): a new actor in this seat. prepare(actor): bring a new actor to the state that all have."""

    def __init__(
        self,
        seats: Sequence[Seat],
        start: Callable[[Seat], Any],
        prepare: Callable[[Any], Awaitable[None]],
        services: Services,
        *,
        restarts: int,
        patience_s: float,
    ):
        self._start, self._prepare, self.services = start, prepare, services
        self._restarts, self._patience_s = restarts, patience_s
        self.members = [Member(seat, start(seat)) for seat in seats]

    async def prepare(self) -> None:
        """Prepare all actors at the same time."""
        await together(self._prepared(member) for member in self.members)

    async def least(self, size: int, call: Call) -> Reply:
        """The answer of the actor with the least outstanding work. size: of this work."""
        member = min(self.members, key=lambda member: member.outstanding)
        member.outstanding += size
        try:
            return await self._asked(member, call)
        finally:
            member.outstanding -= size

    async def each(self, call: Call) -> list[Reply]:
        """The answers of all actors."""
        return await together(self._asked(member, call) for member in self.members)

    async def _asked(self, member: Member, call: Call) -> Reply:
        """The answer. Where the actor ends before it answers, the actor in its place is asked."""
        while True:
            async with member.replacing:
                # A new actor is given nothing before it is prepared.
                actor = member.actor
            try:
                answer = await unwrapped(call(actor))
            except _LOST as error:
                await self._replace(member, actor, error)
                continue
            member.ended = 0
            return answer

    async def _replace(self, member: Member, lost: Any, why: Exception) -> None:
        async with member.replacing:
            if member.actor is not lost:
                # Another call has noticed it first.
                return
            self._count(member, why)
            end(lost)
            self.services.listener.noted(f"{member.who} has ended and is replaced. Its work is done again.")
            member.actor = self._start(member.seat)
            await self._prepared(member)

    async def _prepared(self, member: Member) -> None:
        """Prepare the actor of a seat; one that ends meanwhile is replaced."""
        while True:
            try:
                await asyncio.wait_for(self._prepare(member.actor), self._patience_s)
                return
            except _LOST as error:
                self._count(member, error)
                end(member.actor)
                member.actor = self._start(member.seat)
            except TimeoutError:
                raise ServerError(
                    f"{member.who} was not ready after {self._patience_s:g} s. "
                    "The machine that it was on may be gone, or its model takes longer to load: raise "
                    "cluster.start_timeout_s. The last checkpoint continues this run."
                ) from None

    def _count(self, member: Member, why: Exception) -> None:
        """Count an actor that has ended. ServerError after too many of them."""
        member.ended += 1
        if member.ended > self._restarts:
            raise ServerError(
                f"{member.who} has ended {member.ended} times without an answer in between "
                f"(cluster.restarts = {self._restarts}). Ray says: {_first_line(why)} "
                "Its own messages are above and in Ray's log folder. The last checkpoint continues this run."
            ) from why

    async def close(self) -> None:
        """Let every actor close its part, and end all of them."""
        closing = [asyncio.ensure_future(_closed(member.actor)) for member in self.members]
        try:
            await asyncio.wait(closing, timeout=_CLOSING_S)
        finally:
            for member, task in zip(self.members, closing, strict=True):
                task.cancel()
                end(member.actor)


async def _closed(actor: Any) -> None:
    # It is ended in any case, and an error of the run is more important.
    with suppress(RayError):
        await actor.close.remote()


async def unwrapped(call: Awaitable[Result]) -> Result:
    """The result of a call. An exception that the actor raised is raised as it is. Its cause is Ray's account
    of it.
    """
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise


def end(actor: Any) -> None:
    """End an actor's process, also where it does not answer."""
    ray.kill(actor, no_restart=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
