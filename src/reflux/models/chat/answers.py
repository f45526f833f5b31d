"""The text of a given answer as it follows a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from reflux.models.chat.tags import opened_thinking
from reflux.models.chat.template import ENDED, MARKER, ChatTemplate
from reflux.types import Message


def without_opening(answer: str, prompt: str, suffix: str) -> str:
    """`answer` without the text that ends the prompt already: the suffix, or a tag that opens thinking, with
    the white space after it.
    """
    if suffix and answer.startswith(suffix):
        return answer.removeprefix(suffix)
    tag, space = opened_thinking(prompt)
    if not tag or not answer.startswith(tag):
        return answer
    return answer.removeprefix(tag).removeprefix(space)


def completed(template: ChatTemplate, messages: Sequence[Message], answer: str, closing: str) -> str:
    """What follows the opened turn of the assistant: the answer as the template writes it, and the text that
    ends the turn. Where the template does not write the whole answer, it is the answer itself, and `closing`
    (`closing_text`).
    """
    if template.exists:
        opened = template.write(messages, True)
        whole = template.written([*messages, {"role": "assistant", "content": answer}])
        if whole.startswith(opened) and _solid(answer) in _solid(whole[len(opened) :]):
            return whole[len(opened) :]
    return answer + closing


def closing_text(template: ChatTemplate) -> str:
    """The text that the template writes after an assistant's text."""
    return template.written(ENDED).partition(MARKER)[2]


def _solid(text: str) -> str:
    """The text without white space, because templates trim contents and put lines around thinking."""
    return "".join(text.split())
