"""The chat template of a tokenizer, with its refusals in words."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError

from reflux.errors import ModelError
from reflux.models.chat.call_forms import first_taken
from reflux.types import Message

# The arguments of `apply_chat_template` that a recipe may set besides those of the template.
_GIVEN = {"chat_template", "tools", "documents", "kwargs"}
# Stands for the text of an assistant's turn.
MARKER = "reflux end of turn"
ENDED: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER}]
_CALL = {"type": "function", "id": "a", "function": {"name": "a", "arguments": {"a": "a"}}}
_CALLED: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "a", "tool_call_id": "a", "name": "a"},
]
_TURNS: list[Message] = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
# Some templates take no system message, and some no tool calls, so there are several examples.
_EXAMPLES = (_TURNS, [{"role": "system", "content": "a"}, *_TURNS], _CALLED)


class ChatTemplate:
    """Writes messages as one text. arguments: extra arguments of the template; `chat_template` among them is
    another template, or the name of one of several.

    Without a template the messages' texts are joined by newlines.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None):
        self.tokenizer, self.arguments = tokenizer, dict(arguments or {})
        own = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - _GIVEN
        if wrong := sorted(own & self.arguments.keys()):
            raise ModelError(
                f"template: {', '.join(wrong)} is no argument of a chat template: this library sets it "
                "itself. Remove it from the recipe"
            )

    @property
    def exists(self) -> bool:
        return self.tokenizer.chat_template is not None or "chat_template" in self.arguments

    def write(
        self, messages: Sequence[Message], begin_turn: bool, more: Mapping[str, Any] | None = None
    ) -> str:
        """begin_turn: the text opens the assistant's turn. more: further arguments of the template.
        ModelError, with the template's own words, where it does not take the messages.
        """
        if not self.exists:
            return _joined(messages)
        arguments = {**self.arguments, **(more or {}), "add_generation_prompt": begin_turn}
        apply = functools.partial(self.tokenizer.apply_chat_template, tokenize=False, **arguments)
        try:
            return first_taken(messages, apply)
        except Exception as error:
            # The template is a program of the model's authors, so it may raise anything.
            raise ModelError(self._refusal(messages, error)) from error

    def written(self, messages: Sequence[Message], more: Mapping[str, Any] | None = None) -> str:
        """The text of an example. "" where the template does not take such messages."""
        try:
            return self.write(messages, False, more) if self.exists else ""
        except ModelError:
            return ""

    @functools.cached_property
    def frames(self) -> str:
        """The texts that the template writes around turns, and around tool calls and their results where it
        supports them.
        """
        return "".join(self.written(example) for example in _EXAMPLES)

    def _refusal(self, messages: Sequence[Message], error: Exception) -> str:
        roles = ", ".join(str(message.get("role")) for message in messages)
        whose = getattr(self.tokenizer, "name_or_path", "") or "the model"
        several = self.tokenizer.chat_template
        if isinstance(several, dict) and "default" not in several and "chat_template" not in self.arguments:
            names = ", ".join(sorted(several))
            return (
                f"{whose} has several chat templates ({names}) and none of them is the default. Name one in "
                "the model's table of the recipe: template = {chat_template = NAME}"
            )
        other = "give another template in the model's table of the recipe: template = {chat_template = TEXT}"
        if isinstance(error, TemplateSyntaxError):
            return f"the chat template of {whose} is malformed: {error}. Correct it in its file, or {other}"
        return (
            f"the chat template of {whose} does not take the messages (roles: {roles}). "
            f"It says: {type(error).__name__}: {str(error).strip() or 'nothing'}. Change the messages or "
            f"the recipe's `system`, or {other}"
        )


def _joined(messages: Sequence[Message]) -> str:
    if any(message.get("tool_calls") for message in messages):
        raise ModelError(
            "the model has no chat template, so tool calls cannot be shown to it. Write them into the content"
        )
    return "\n".join(message["content"] for message in messages)
