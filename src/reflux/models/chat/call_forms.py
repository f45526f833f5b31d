"""The forms in which data hold tool calls. A chat template may take only some of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from reflux.types import Message


def first_taken(messages: Sequence[Message], write: Callable[[list[Message]], str]) -> str:
    """What `write` gives for the first form of the messages that it takes. Its last exception if it takes
    none.

    Arguments of calls are tried as objects first, because most templates write them as JSON and would put a
    text in quotes once more. The content of a message that only calls tools is tried as None first, because
    some templates ask for that; others would write the word None.
    """
    forms = [form for objects in (True, False) for form in _forms(messages, objects)]
    refused = Exception()
    for form in [form for place, form in enumerate(forms) if form not in forms[:place]]:
        try:
            text = write(form)
            empty = write(_with_empty(form)) if form != _with_empty(form) else text
        except Exception as error:
            refused = error
            continue
        return text if text.count("None") <= empty.count("None") else empty
    raise refused


def _forms(messages: Sequence[Message], objects: bool) -> list[list[Message]]:
    given = [
        {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}
        if objects and message.get("tool_calls")
        else message
        for message in messages
    ]
    return [given, _with_empty(given)]


def _with_empty(messages: Sequence[Message]) -> list[Message]:
    return [
        {**message, "content": ""} if message.get("content", "") is None else message for message in messages
    ]


def _call(call: Any) -> Any:
    """The call with its arguments as an object, where they are the JSON text of one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    read = {**function, "arguments": arguments} if isinstance(arguments, dict) else function
    return {**call, "function": read} if "function" in call else read
