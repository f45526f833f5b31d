"""The actors of one part. Work goes to the one with the least of it. An actor that ends is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from reflux.errors import ServerError
from reflux.runtime.together import together

if TYPE_CHECKING:
    from reflux.cluster.actors import Reply
    from reflux.cluster.base import Bundle
    from reflux.runtime.services import Services

Result = TypeVar("Result")
# A call of an actor: it gives a reference to the result, which is awaited.
Call = Callable[[Any], Awaitable[Any]]
# The calls that bring a new actor to the state that all actors have.
Opening = Callable[[], Iterable[Call]]
# The process of the actor ended, or its answer was lost with the machine that it was on.
_LOST = (RayActorError, OutOfMemoryError, ObjectLostError)
# Seconds that an actor has to close its part, such as a server that it started.
_CLOSING_S = 20.0


class Member:
    """One bundle and the actor in it. outstanding: the size of the work that it has been given. ended: how
    many actors ended here since the last answer.
    """

    def __init__(self, bundle: Bundle, actor: Any):
        self.bundle, self.actor = bundle, actor
        self.outstanding, self.ended = 0, 0
        self.replacing = asyncio.Lock()

    @property
    def label(self) -> str:
        return f"{self.bundle.label} actor {self.bundle.index}"


class Pool:
    """start(bundle): a new actor in this bundle. opening: the calls that every new actor gets first.
    restarts: how often an actor may end without an answer in between. timeout_s: seconds of the opening.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        start: Callable[[Bundle], Any],
        opening: Opening,
        services: Services,
        *,
        restarts: int,
        timeout_s: float,
    ):
        self._start, self._opening, self.services = start, opening, services
        self._restarts, self._timeout_s = restarts, timeout_s
        self.members = [Member(bundle, start(bundle)) for bundle in bundles]

    async def open(self) -> list[Reply]:
        """Open all actors at the same time. Returns the reply of each one to its first call."""
        return await together(self._opened(member) for member in self.members)

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
                # A new actor is given nothing before it is open.
                actor = member.actor
            try:
                answer = await self._reply(actor, call)
            except _LOST as error:
                await self._replace(member, actor, error)
                continue
            member.ended = 0
            return answer

    async def _reply(self, actor: Any, call: Call) -> Reply:
        """The answer of this actor. What it tells the user is passed on."""
        reply: Reply = await unwrapped(call(actor))
        self.services.tell(reply.notes)
        return reply

    async def _replace(self, member: Member, lost: Any, why: Exception) -> None:
        async with member.replacing:
            if member.actor is not lost:
                # Another call has noticed it first.
                return
            self._restart(member, why)
            await self._opened(member)

    async def _opened(self, member: Member) -> Reply:
        """Open the actor of a bundle. One that ends meanwhile is replaced."""
        while True:
            limit = asyncio.timeout(self._timeout_s)
            try:
                async with limit:
                    replies = [await self._reply(member.actor, call) for call in self._opening()]
                return replies[0]
            except _LOST as error:
                self._restart(member, error)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise not_ready(member.label, self._timeout_s) from None

    def _restart(self, member: Member, why: Exception) -> None:
        """Start an actor in the place of one that has ended. ServerError after too many of them."""
        member.ended += 1
        if member.ended > self._restarts:
            raise ServerError(
                f"{member.label} has ended {member.ended} times without an answer in between "
                f"(cluster.restarts = {self._restarts}). Ray says: {first_line(why)} "
                "Its own messages are above and in Ray's log folder. The last checkpoint continues this run."
            ) from why
        end(member.actor)
        self.services.listener.noted(f"{member.label} has ended and is replaced. Its work is done again.")
        member.actor = self._start(member.bundle)

    async def aclose(self) -> None:
        """Let every actor close its part, and end all of them."""
        closing = [asyncio.ensure_future(_closed(member.actor)) for member in self.members]
        try:
            await asyncio.wait(closing, timeout=_CLOSING_S)
        finally:
            for member, task in zip(self.members, closing, strict=True):
                task.cancel()
                end(member.actor)


def open_part(actor: Any) -> Awaitable[Any]:
    """The first call of every actor."""
    return actor.open.remote()


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


def not_ready(label: str, timeout_s: float) -> ServerError:
    """The error for an actor that does not start or open in time."""
    return ServerError(
        f"{label} was not ready after {timeout_s:g} s. The machine that it was on may be gone, or its model "
        "takes longer to load: raise cluster.start_timeout_s. The last checkpoint continues this run."
    )


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
