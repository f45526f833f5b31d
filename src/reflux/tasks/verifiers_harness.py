"""The loop of the student's seat in an environment of `verifiers`, in this process. It needs the package."""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

__all__ = ["ChatHarness"]

_NAME = "reflux_chat"


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Asks the model, calls the tools that it asks for, and asks again, until a reply has no call. It is the
    harness `null` of the package without a program of its own.
    """

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=None))
            tools, dispatch, connected = await connect_mcp({"mcpServers": servers}, stack)
            body = {"model": ctx.model, **({"tools": tools} if tools else {})}
            while True:
                answer = await client.post(
                    f"{endpoint}/chat/completions",
                    json={**body, "messages": messages},
                    headers={"Authorization": f"Bearer {secret}"},
                )
                if answer.status_code != 200:
                    # A limit or a stop of the environment, or an error that the trace holds already.
                    return vf.ProgramResult(exit_code=1, stdout="", stderr=answer.text)
                message = answer.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in message["tool_calls"]:
                    content = await _called(call["function"], connected, dispatch)
                    told = {"tool_call_id": call["id"], "name": call["function"]["name"], "content": content}
                    messages.append({"role": "tool", **told})


async def _called(function: dict[str, Any], servers: Any, dispatch: dict[str, Any]) -> Any:
    """The result of a call, or what is wrong with it: a fault of the student is told to the student."""
    if function["name"] not in dispatch:
        return f"error: unknown tool {function['name']!r}"
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        return f"error: the arguments are not JSON ({error})"
    if not isinstance(arguments, dict):
        return "error: the arguments must be a JSON object"
    return await call_mcp(servers, dispatch, function["name"], arguments)


def register() -> str:
    """The id under which the package finds this harness, as one of its own modules."""
    sys.modules.setdefault(f"verifiers.v1.harnesses.{_NAME}", sys.modules[__name__])
    return _NAME
