"""Keeps one server alive: a server that is lost is replaced by a fresh one with the current state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from reflux.engines.vllm_server import VLLMServer
from reflux.errors import ServerError, ServerRefused

Act = Callable[[VLLMServer], Awaitable[None]]


class Supervisor:
    """start: makes a server. prepare: gives a fresh server the current state, such as the weights. restarts:
    the most replacements without an answer between them; None for a server that cannot be replaced. tell:
    gets a sentence for each replacement.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[VLLMServer]],
        prepare: Act,
        restarts: int | None,
        tell: Callable[[str], None],
    ):
        self._start, self._prepare, self._restarts, self._tell = start, prepare, restarts, tell
        self._server: VLLMServer | None = None
        # Held while the server is changed or replaced.
        self._changing = asyncio.Lock()
        # replacements since the last answer, and all of them
        self._vain = self.replaced = 0

    async def open(self) -> VLLMServer:
        self._server = await self._start()
        await self._prepare(self._server)
        return self._server

    async def ready(self) -> VLLMServer:
        """The server with its current state, once no change is in progress. ServerError if there is none."""
        async with self._changing:
            if not self._current.running:
                await self._replace("it ended.")
            return self._current

    async def lost(self, server: VLLMServer, error: ServerError) -> None:
        """Called where `server` gave no answer: replace it, unless that was done meanwhile."""
        async with self._changing:
            if server is self._current:
                await self._replace(str(error), error)

    def answered(self) -> None:
        """Called after each answer: the server is not replaced in vain."""
        self._vain = 0

    async def change(self, act: Act) -> None:
        """Change the state of the server. Where that fails it is replaced by a server that `prepare` has
        given the state that it should have had.
        """
        async with self._changing:
            server = self._current
            if not server.running:
                return await self._replace("it ended.")
            try:
                await act(server)
            except ServerError as error:
                await self._replace(f"a change of its weights failed: {error}", error)

    async def close(self) -> None:
        async with self._changing:
            if self._server is not None:
                await self._server.close()
                self._server = None

    @property
    def _current(self) -> VLLMServer:
        if self._server is None:
            raise ServerError("the server is closed, and no request can be sent any more.")
        return self._server

    async def _replace(self, why: str, error: ServerError | None = None) -> None:
        old = self._current
        if self._restarts is None:
            raise ServerError(
                f"the server at {old.requests.url} cannot be used any more: {why} Start it again, and "
                "continue the run with --resume."
            ) from error
        await old.kill()
        while True:
            if self._vain >= self._restarts:
                raise ServerError(
                    f"the vLLM server failed {self._vain + 1} times without an answer in between, the last "
                    f"time because {why} Its log is {_log(old)}."
                ) from error
            self._vain += 1
            self.replaced += 1
            self._tell(f"The vLLM server is started again, because {why}")
            self._server = await self._start()
            try:
                return await self._prepare(self._server)
            except ServerRefused:
                raise
            except ServerError as failed:
                why, error = f"a fresh server did not take the weights: {failed}", failed
                await self._server.kill()


def _log(server: VLLMServer) -> str:
    return str(server.process.log) if server.process is not None else "with the server"
