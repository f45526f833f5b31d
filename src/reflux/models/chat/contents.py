"""The contents of messages as texts."""

from __future__ import annotations

from typing import Any

from reflux.errors import ModelError
from reflux.types import Message


def as_text(message: Message) -> Message:
    """The message with its content as one text, also where it is a list of texts ({"type": "text"}). Only a
    message that calls tools may have the content None. ModelError for other contents.
    """
    content, role = message.get("content"), message.get("role")
    if content is None and not message.get("tool_calls"):
        raise ModelError(f"a message with the role {role!r} has no content. Give it a text")
    if content is None or isinstance(content, str):
        return message
    parts = [_part(part) for part in content] if isinstance(content, list | tuple) else [None]
    if None in parts:
        raise ModelError(
            f"the content of a message with the role {role!r} is neither a text nor a list of texts, and "
            "text models read only texts. Write it as a text"
        )
    return {**message, "content": "".join(map(str, parts))}


def _part(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None
