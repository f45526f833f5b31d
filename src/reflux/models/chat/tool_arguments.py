"""The arguments of tool calls, which are objects in some data and JSON texts in other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from reflux.types import Message


def with_objects(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of tool calls as objects where they are JSON texts of objects. Most
    templates write arguments as JSON, and so would put a text in quotes once more.
    """
    return [
        {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _call(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    read = {**function, "arguments": arguments} if isinstance(arguments, dict) else function
    return {**call, "function": read} if "function" in call else read
