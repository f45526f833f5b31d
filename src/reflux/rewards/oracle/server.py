"""The rule server over HTTP: POST /v1/chat/completions and GET /v1/models."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from reflux.errors import ConfigError, ServerError
from reflux.rewards.oracle.rule_answers import Oracle, Unanswerable

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MODEL = "rules"
# Seconds in which a server on this machine starts.
START_S = 30.0


def application(oracle: Oracle) -> Starlette:
    """The server as an ASGI application."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    # How often each request came, for faults that another try may escape.
    seen: Counter[str] = Counter()

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def completions(request: Request) -> Response:
        return await _completion(oracle, seen, await request.body())

    return Starlette(
        routes=[Route("/v1/models", models), Route("/v1/chat/completions", completions, methods=["POST"])]
    )


async def _completion(oracle: Oracle, seen: Counter[str], data: bytes) -> Response:
    from starlette.responses import JSONResponse, Response

    faults, digest = oracle.faults, hashlib.sha256(data).hexdigest()
    seen[digest] += 1
    came = (digest, seen[digest])
    if faults.strikes(faults.slow, "slow", *came):
        await asyncio.sleep(faults.slow_s)
    if faults.strikes(faults.busy, "busy", *came):
        return _refusal(429, "too many requests", {"retry-after": f"{faults.retry_after_s:g}"})
    if faults.strikes(faults.failing, "failing", *came):
        return _refusal(500, "the server failed")
    try:
        body = _checked(json.loads(data))
        if faults.refuses_forms and "response_format" in body:
            return _refusal(400, "response_format is not supported")
        whole = _whole(body, oracle.content(body))
    except (Unanswerable, ValueError, KeyError, TypeError) as error:
        return _refusal(400, str(error))
    if faults.strikes(faults.dropped, "dropped", *came):
        return _dropping(json.dumps(whole).encode())
    if faults.strikes(faults.garbled, "garbled", *came):
        text = json.dumps(whole)
        return Response(text[: len(text) // 2], media_type="application/json")
    return JSONResponse(whole)


def _checked(body: Any) -> dict[str, Any]:
    """ValueError for a body that is no chat request."""
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is missing")
    return body


def _whole(body: dict[str, Any], content: str) -> dict[str, Any]:
    """A chat completion. A token is counted for every four characters."""
    prompt = sum(len(str(message["content"])) for message in body["messages"]) // 4 + 1
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": prompt, "completion_tokens": len(content) // 4 + 1}
    return {
        "id": "rules",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model", MODEL),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": {"message": message, "type": "error"}}, status, headers)


def _dropping(data: bytes) -> Response:
    """An answer that promises more bytes than it sends, after which the server closes the connection."""
    from starlette.responses import StreamingResponse

    async def part() -> AsyncIterator[bytes]:
        yield data[: len(data) // 2]

    headers = {"content-length": str(len(data))}
    return StreamingResponse(part(), media_type="application/json", headers=headers)


def uvicorn_server(oracle: Oracle, host: str, port: int, log_level: str) -> uvicorn.Server:
    """The server, not yet started. ConfigError if its packages are not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"the rule server needs packages that are not installed ({error}). Install them with: pip "
            "install 'reflux[chat]'"
        ) from error
    config = uvicorn.Config(
        application(oracle), host=host, port=port, log_level=log_level, timeout_graceful_shutdown=1
    )
    return uvicorn.Server(config)


@contextmanager
def serving(oracle: Oracle) -> Iterator[str]:
    """The URL of a server in a thread of this process, on a port of this machine that was free. It ends with
    the block.
    """
    server = uvicorn_server(oracle, "127.0.0.1", 0, "critical")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True, name="reflux-rules")
        thread.start()
        try:
            deadline = time.monotonic() + START_S
            while not server.started:
                if time.monotonic() > deadline or not thread.is_alive():
                    raise ServerError("the rule server did not start")
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()
