"""Whether a chat template shows everything that messages hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from reflux.errors import ModelError
from reflux.models.chat.template import ChatTemplate
from reflux.types import Message

# Letters and digits only, so that no template escapes or divides it.
_MARK = "refluxmark{}x"


class Shown:
    """Checks that a template leaves out no content and no tool call. Messages of one structure (roles, and
    which of them have contents and calls) are checked once.
    """

    def __init__(self, template: ChatTemplate):
        self.template = template
        self.checked: set[tuple[Any, ...]] = set()

    def check(self, messages: Sequence[Message]) -> None:
        """ModelError for a content or a tool call that the template does not write."""
        structure = tuple(
            (message["role"], bool(message.get("content")), len(message.get("tool_calls") or ()))
            for message in messages
        )
        if structure in self.checked or not self.template.exists:
            return
        marks: dict[str, str] = {}
        text = self.template.written([_marked(message, marks) for message in messages])
        for mark, what in marks.items() if text else ():
            if mark not in text:
                raise ModelError(
                    f"the chat template does not show {what}: the model would never read it. Write it into "
                    "the content of another message, or give a template that shows it"
                )
        self.checked.add(structure)


def _marked(message: Message, marks: dict[str, str]) -> Message:
    """The message with marks as its content and as the names and arguments of its calls. `marks` gets each
    mark, and what it stands for.
    """

    def mark(what: str) -> str:
        made = _MARK.format(len(marks))
        marks[made] = what
        return made

    role = message["role"]
    marked = dict(message)
    if message.get("content") and isinstance(message["content"], str):
        calls = " that also call tools" if message.get("tool_calls") else ""
        marked["content"] = mark(f"the content of messages with the role {role!r}{calls}")
    if message.get("tool_calls"):
        marked["tool_calls"] = [_call(call, mark) for call in message["tool_calls"]]
    return marked


def _call(call: Any, mark: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    marked = {**function, "name": mark("the name of a tool call")}
    if function.get("arguments"):
        value = {"mark": mark("the arguments of a tool call")}
        marked["arguments"] = json.dumps(value) if isinstance(function["arguments"], str) else value
    return {**call, "function": marked} if "function" in call else marked
