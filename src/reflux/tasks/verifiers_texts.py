"""Messages of `verifiers` as texts of a student, and texts of a student as messages. Needs no package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reflux.types import Message

# As the models that write calls in this form do it, Qwen and Hermes among them.
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_TOOLS = """# Tools

You may call one or more functions. Their signatures, one JSON object per line, are:
{tools}

To call a function, write its name and arguments as a JSON object between tags, and nothing after it:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def first_messages(
    system: str | None, prompt: str | Sequence[Mapping[str, Any]] | None
) -> tuple[Message, ...]:
    """The messages that a model is shown first. ValueError, with the end of a sentence, where there are none
    or where they hold more than texts.
    """
    before = [{"role": "system", "content": system}] if system else []
    if prompt is None:
        raise ValueError("has no prompt: a user opens its conversation, and a prompt must be known before")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [plain(m) for m in prompt]
    found = (*before, *asked)
    if not asked or found[-1]["role"] == "assistant":
        raise ValueError("has a prompt that does not end before a turn of the student")
    return found


def plain(message: Mapping[str, Any]) -> Message:
    """The message with its content as one text. ValueError, with the end of a sentence, for images."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("shows an image, and a student of texts reads none")
        content = "\n".join(part["text"] for part in content)
    kept = ("tool_call_id", "name", "tool_calls")
    rest = {key: message[key] for key in kept if message.get(key) is not None}
    return {"role": message["role"], "content": content, **rest}


def shown_tools(tools: Iterable[Mapping[str, Any]]) -> str:
    """The text that describes tools to the student."""
    return _TOOLS.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))


def with_tools(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The messages with this text at the end of the system message, or as one."""
    first, *rest = messages
    if first["role"] == "system":
        return ({**first, "content": f"{first['content']}\n\n{text}"}, *rest)
    return ({"role": "system", "content": text}, *messages)


def as_reply(text: str, turn: int) -> Message:
    """The student's text as the message of a model: calls of tools apart from the rest of the text. A call
    that is no JSON object with a name stays text. turn: the number of the turn, for the ids of the calls.
    """
    calls = []
    for number, found in enumerate(_CALL.findall(text)):
        try:
            call = json.loads(found)
        except (ValueError, RecursionError):
            continue
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            arguments = call.get("arguments", {})
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments)
            function = {"name": call["name"], "arguments": arguments}
            calls.append({"id": f"call_{turn}_{number}", "type": "function", "function": function})
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": _CALL.sub("", text).strip(), "tool_calls": calls}


def continued(known: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """The messages of a request after those that are known. ValueError, with the end of a sentence, if the
    request begins otherwise, if nothing follows, or if an image follows.
    """
    if [_compared(message) for message in asked[: len(known)]] != [_compared(message) for message in known]:
        raise ValueError("asks with other messages than those before")
    following = tuple(plain(message) for message in asked[len(known) :])
    if not following or any(message["role"] == "assistant" for message in following):
        raise ValueError("asks again without a message that follows the student's turn")
    return following


def _compared(message: Mapping[str, Any]) -> tuple[Any, ...]:
    shown = plain(message)
    calls = [(call["id"], call["function"]["name"]) for call in message.get("tool_calls") or ()]
    return shown["role"], shown["content"], calls, message.get("tool_call_id")
