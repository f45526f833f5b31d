"""Read the fields of a prompt from a row of a data file. An error is the end of a sentence about the row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from reflux.types import Message

# the keys under which data hold the thinking of an assistant message; some chat templates read them
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "tool_plan")
# the keys of a message that are kept
_OF_MESSAGES = ("role", "content", "tool_calls", "tool_call_id", "name", *_THOUGHTS)


def value_of(fields: Mapping[str, Any], column: str) -> Any:
    """The value of a column; None if the row has none. "a.b" is the column of that name, or else the key b in
    the column a.
    """
    if column in fields:
        return fields[column]
    outer, dot, inner = column.partition(".")
    nested = fields.get(outer) if dot else None
    return value_of(nested, inner) if isinstance(nested, Mapping) else None


def names_in(rows: Iterable[Mapping[str, Any]], prefix: str = "") -> list[str]:
    """The columns in which some row has a value, nested ones as "a.b", in order of their names."""
    found: set[str] = set()
    for row in rows:
        for name, value in row.items():
            if isinstance(value, Mapping):
                found.update(names_in([value], f"{prefix}{name}."))
            elif value is not None:
                found.add(f"{prefix}{name}")
    return sorted(found)


def messages_of(prompt: Any, messages: Any, names: tuple[str, str]) -> tuple[Message, ...]:
    """The messages of a row from the values of its columns `prompt` and `messages`, of which one is None.
    names: the names of these columns, for errors.
    """
    if prompt is not None and messages is not None:
        raise ValueError(f"has both '{names[0]}' and '{names[1]}', and only one is allowed")
    name, chat = (names[1], messages) if prompt is None else (names[0], prompt)
    if prompt is not None and not isinstance(prompt, list):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"needs a non-empty string in the field '{name}', got {prompt!r}")
        return ({"role": "user", "content": _whole(prompt, name)},)
    found = _chat(chat, name)
    if found[-1]["role"] == "assistant":
        raise ValueError(
            "ends with an assistant turn, which the student must write. Move it to 'references' or 'answer'"
        )
    if found[-1]["role"] == "user" and not found[-1]["content"].strip():
        raise ValueError(f"ends with a user message without text in its field '{name}'")
    return tuple(found)


def references_of(value: Any, name: str) -> tuple[str, ...]:
    """The references in a column: a text, a list of texts, or the messages of one assistant turn. name: the
    name of the column, for errors.
    """
    if value is None:
        return ()
    if isinstance(value, str) and value:
        return (_whole(value, name),)
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        turns = _chat(value, name)
        texts = tuple(turn["content"] for turn in turns if turn["role"] == "assistant" and turn["content"])
        if len(turns) > 1 or not texts:
            raise ValueError(
                f"needs exactly one assistant message with a text in its field '{name}', but it has "
                f"{' and '.join(turn['role'] for turn in turns)}"
            )
        if beside := [key for key in ("tool_calls", *_THOUGHTS) if turns[0].get(key)]:
            raise ValueError(
                f"has an assistant message with '{beside[0]}' in its field '{name}', and only the content is "
                "learnt. Write all that the student shall learn into the content, such as <think>...</think>"
            )
        return texts
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"has no list of texts in its field '{name}', but {value!r}")
    return tuple(_whole(text, name) for text in value)


def text_of(value: Any, name: str) -> str | None:
    """The text, or a number as text. None if the row has no such value. name: the column, for errors."""
    if value is None:
        return None
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not (number or isinstance(value, str)) or not str(value).strip():
        raise ValueError(f"has neither text nor a number in its field '{name}', but {value!r}")
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        raise ValueError(f"has no finite number in its field '{name}', but {value!r}")
    return _whole(str(value), name)


def _chat(messages: Any, name: str) -> list[Message]:
    if isinstance(messages, list):
        messages = [_joined(message) for message in messages]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f'has no list of {{"role": text, "content": text}} in its field \'{name}\'')
    for message in messages:
        _whole(message.get("content") or "", name)
    # Tables give every message all keys of the other messages, with no value.
    return [
        {"content": None} | {key: message[key] for key in _OF_MESSAGES if message.get(key) is not None}
        for message in messages
    ]


def _joined(message: Any) -> Any:
    """The message with its content as one text, if the content is a list of parts that are all texts."""
    parts = message.get("content") if isinstance(message, dict) else None
    if (
        not isinstance(parts, list)
        or not parts
        or not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in parts
        )
    ):
        return message
    return {**message, "content": "".join(part["text"] for part in parts)}


def _is_message(message: Any) -> bool:
    """True for a message with a role and a text. An assistant message that calls tools may have no text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    calls = message["role"] == "assistant" and message.get("tool_calls")
    content = message.get("content")
    return isinstance(content, str) or (isinstance(calls, list) and bool(calls) and content is None)


def _whole(text: str, name: str) -> str:
    """The text. ValueError if it holds half of a surrogate pair, which no tokenizer reads."""
    if text.isascii() or text.encode(errors="ignore").decode() == text:
        return text
    raise ValueError(
        f"has half of a character (a lone surrogate such as \\ud83d) in its field '{name}'. Write the text "
        "again from its source"
    )
