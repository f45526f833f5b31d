"""What a run should know of chat templates before it starts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from reflux.models.chat.renderer import Renderer
from reflux.types import Message

# Number of tokens shown on both sides of a difference.
_SHOWN = 6


def prints_clock(renderer: Renderer, messages: Sequence[Message]) -> bool:
    """True if the template writes the time into these messages. The same prompt then has other tokens on
    another day, so a resumed run does not repeat the one before.
    """
    days = [renderer.template.written(messages, {"strftime_now": lambda _, day=day: day}) for day in "12"]
    return days[0] != days[1]


def closing_end(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> int | None:
    """The end token that a prompt ends with; None if it ends with another token. White space after the end
    token does not count. A student that begins after an end token has seen such texts never or rarely.
    """
    written = (i for i in reversed(ids) if tokenizer.decode([i]).strip())
    last = next(written, None)
    return last if last in ends else None


def first_difference(student: Renderer, teacher: Renderer, messages: Sequence[Message]) -> str | None:
    """Where student and teacher read other tokens for the same messages, in words; None where they read the
    same.
    """
    ours, theirs = student.ids(messages), teacher.ids(messages)
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    place = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    place = min(len(ours), len(theirs)) if place is None else place
    shown = [
        repr(renderer.tokenizer.decode(ids[place : place + _SHOWN])) if place < len(ids) else "nothing"
        for renderer, ids in ((student, ours), (teacher, theirs))
    ]
    return (
        f"the student's prompt has {len(ours)} tokens and the teacher's {len(theirs)}. They differ from "
        f"token {place} on: the student reads {shown[0]}, the teacher {shown[1]}"
    )


def unread_arguments(renderer: Renderer) -> list[str]:
    """The names of the recipe's template arguments that the template never reads, so that they change
    nothing. `enable_thinking = false` is not named where the template writes no thinking at all.
    """
    source, read, given = "", set[str](), renderer.template.arguments
    if renderer.template.exists:
        source = renderer.tokenizer.get_chat_template(given.get("chat_template"))
        try:
            read = find_undeclared_variables(
                Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
            )
        except TemplateSyntaxError:
            # It has tags of transformers' own, so what it reads is not known.
            return []
        read |= {"chat_template"}
    if given.get("enable_thinking") is False and "think" not in source:
        read |= {"enable_thinking"}
    return sorted(given.keys() - read)
