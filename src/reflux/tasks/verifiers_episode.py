"""One attempt as an episode of an environment of `verifiers`. The environment asks a model over HTTP, and
this process answers with the student's turns.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from reflux.errors import DataError
from reflux.rollouts.environment import Observation, ToolError
from reflux.tasks.verifiers_data import Loaded, One
from reflux.tasks.verifiers_texts import as_reply, continued
from reflux.types import Message

# The header in which the package names the conversation that a request belongs to.
_CONVERSATION = "X-Session-ID"
# Seconds that the end of an episode waits for requests in progress.
_SHUTDOWN_S = 1.0


@dataclass(frozen=True)
class HeldCall:
    """A request for the student's next turn."""

    messages: list[dict[str, Any]]
    answer: asyncio.Future[Message | str]


class Episode:
    """The environment of one attempt. The episode begins with the first turn, because opening must be fast.

    one: the task. seat: the agent that the student plays.
    """

    def __init__(self, loaded: Loaded, one: One, seat: str):
        self._loaded, self._one, self._seat = loaded, one, seat
        self._asks: asyncio.Queue[HeldCall] = asyncio.Queue()
        self._known: list[Any] = []
        self._running: asyncio.Task[Any] | None = None
        self._ask: HeldCall | None = None
        # the conversations of the seat
        self._conversations: list[str] = []
        self._turns = 0

    async def step(self, message: Message) -> Observation:
        if self._running is None:
            self._running = asyncio.create_task(self._played())
            if not await self._asked():
                return self._ended()
            assert self._ask is not None
            self._begin(self._ask)
        assert self._ask is not None
        reply = as_reply(message["content"], self._turns)
        self._turns += 1
        self._known = [*self._ask.messages, reply]
        self._ask.answer.set_result(reply)
        if not await self._asked():
            return self._ended()
        return Observation(self._continued(self._known, self._ask.messages))

    async def close(self) -> None:
        if self._ask is not None and not self._ask.answer.done():
            # A request that waits would hold up the end of its server.
            self._ask.answer.set_result("the attempt has ended")
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._running

    def _begin(self, ask: HeldCall) -> None:
        """Check that the environment asks what the student was asked."""
        *before, last = self._one.begins
        if self._continued(before, ask.messages) != (last,):
            raise self._unlike("asks with other messages than its task has")

    def _continued(self, known: Any, asked: Any) -> tuple[Message, ...]:
        try:
            return continued(known, asked)
        except ValueError as error:
            raise self._unlike(str(error)) from error

    def _unlike(self, what: str) -> DataError:
        return DataError(
            f"task verifiers: the environment of task {self._one.id} of '{self._loaded.taskset}' {what}. An "
            "attempt is one conversation that begins with its prompt and only grows. Use an environment that "
            "does so."
        )

    async def _asked(self) -> bool:
        """True if the environment asks for another turn, False if the episode has ended."""
        asking = asyncio.create_task(self._asks.get())
        assert self._running is not None
        try:
            await asyncio.wait([asking, self._running], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not asking.done():
                asking.cancel()
        self._ask = asking.result() if asking.done() and not asking.cancelled() else None
        return self._ask is not None

    def _ended(self) -> Observation:
        """What the episode gave. ToolError if it failed."""
        assert self._running is not None
        episode = self._running.result()
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if errors:
            raise ToolError(f"{errors[0].type}: {errors[0].message}")
        own = [trace for trace in episode.traces if trace.id in self._conversations]
        if len(own) != 1:
            raise self._unlike(f"played the seat '{self._seat}' {len(own)} times in one episode")
        known = [reward for reward in own[0].rewards.values() if reward is not None]
        return Observation(done=True, reward=float(own[0].reward) if known else None)

    async def _played(self) -> Any:
        """Play one episode, and return it."""
        import verifiers.v1 as vf

        env = vf.load_environment(self._loaded.config)
        async with serving(self._answered) as url:
            # No variable has this name, so no key is sent.
            client = vf.EvalClientConfig(base_url=url, api_key_var="REFLUX_NO_KEY")
            async with env.serving():
                return await env.run_episode(
                    self._one.task, vf.ModelContext(model="student", client=client), on_trace=self._met
                )

    def _met(self, trace: Any) -> None:
        if trace.agent.name == self._seat:
            self._conversations.append(trace.id)

    async def _answered(self, conversation: str, body: dict[str, Any]) -> Message | str:
        """The student's turn for a request of the environment, or why there is none."""
        if conversation not in self._conversations:
            return (
                f"only the seat '{self._seat}' is played by the student. Give the other seats a client and a "
                "model in task.settings"
            )
        if body.get("stream"):
            return "the student's turns are not streamed. Use the harness that task.settings has by default"
        offered = [tool["function"]["name"] for tool in body.get("tools") or ()]
        shown = [tool["function"]["name"] for tool in self._loaded.tools]
        if sorted(offered) != sorted(shown):
            return f"the environment offers the tools {offered}, and the student was shown {shown}"
        ask = HeldCall(body["messages"], asyncio.get_running_loop().create_future())
        await self._asks.put(ask)
        return await ask.answer


@contextlib.asynccontextmanager
async def serving(answered: Any) -> AsyncIterator[str]:
    """The address of a model server on this machine, until the block ends. answered(conversation, body): the
    message that answers a chat request, or the text of an error.
    """
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        body = await request.json()
        made = await answered(request.headers.get(_CONVERSATION, ""), body)
        if isinstance(made, str):
            return web.json_response({"error": {"message": made}}, status=400)
        finish = "tool_calls" if made.get("tool_calls") else "stop"
        choice = {"index": 0, "message": made, "finish_reason": finish}
        about = {"id": "reflux", "object": "chat.completion", "created": 0, "model": body["model"]}
        return web.json_response({**about, "choices": [choice]})

    # Without a limit of a request's size: conversations are long.
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()
