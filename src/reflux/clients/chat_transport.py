"""The client of the package openai, of version 2 or 3, and what a server said in one of its errors."""

from __future__ import annotations

import importlib
from typing import Any

from reflux.clients.http import KEEPALIVE_S


def connected(openai: Any, url: str, key: str, concurrency: int) -> Any:
    """The package's client, without its own retries and without what it reads from the environment."""
    # Version 3 uses httpx2, version 2 httpx.
    second = int(openai.__version__.split(".")[0]) < 3
    transport = openai.DefaultAsyncHttpxClient if second else openai.DefaultAsyncHttpx2Client
    limits = importlib.import_module("httpx" if second else "httpx2").Limits(
        max_keepalive_connections=concurrency, keepalive_expiry=KEEPALIVE_S
    )
    nothing = openai.Omit()
    return openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=url,
        max_retries=0,
        # The limit of a whole try is kept by `asyncio.timeout`.
        timeout=None,
        default_headers={"OpenAI-Organization": nothing, "OpenAI-Project": nothing},
        http_client=transport(trust_env=False, limits=limits),
    )


def said(error: Any) -> str:
    """What the server said about an error: the message in its JSON, or else the start of the text."""
    body = error.body
    for key in ("error", "message", "detail"):
        body = body.get(key, body) if isinstance(body, dict) else body
    return str(body if body is not None else "")
