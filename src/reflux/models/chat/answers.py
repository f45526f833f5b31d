"""The text of a given answer as it follows a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

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
    return _without_common(answer.removeprefix(tag), space) if tag and answer.startswith(tag) else answer


def completed(
    template: ChatTemplate, messages: Sequence[Message], prompt: str, answer: str, closing: str
) -> str:
    """What follows `prompt`, the text of the messages that ends with the opened turn of the assistant: the
    answer as the template writes it, and the text that ends the turn. Where the template does not write the
    whole answer there, it is the answer itself, and `closing` (`closing_text`).
    """
    rest = _following(prompt, template.written([*messages, {"role": "assistant", "content": answer}]))
    return rest if rest and _solid(answer) in _solid(rest) else answer + closing


def closing_text(template: ChatTemplate) -> str:
    """The text that the template writes after an assistant's text, without `last_text`."""
    return template.written(ENDED).partition(MARKER)[2].removesuffix(last_text(template))


def last_text(template: ChatTemplate) -> str:
    """The end token of the tokenizer, where the template writes it once after the closed last turn, and not
    between turns, as in Phi-3; "" otherwise.
    """
    end = template.tokenizer.eos_token or ""
    closed = template.written(ENDED).partition(MARKER)[2]
    between = template.written([*ENDED, *ENDED[:1]]).partition(MARKER)[2]
    turn = closed.removesuffix(end)
    return end if turn.strip() and between.startswith(turn) and not between.startswith(closed) else ""


def _following(prompt: str, whole: str) -> str:
    """What follows `prompt` in `whole`. "" if `whole` does not begin with it, apart from white space after a
    tag that opens thinking, of which some templates write more in prompts than in answered turns.
    """
    space = "" if whole.startswith(prompt) else opened_thinking(prompt)[1]
    begun = prompt.removesuffix(space)
    return _without_common(whole[len(begun) :], space) if whole.startswith(begun) else ""


def _without_common(text: str, space: str) -> str:
    """The text without as much of `space` as it begins with."""
    common = takewhile(lambda pair: pair[0] == pair[1], zip(text, space, strict=False))
    return text[len(list(common)) :]


def _solid(text: str) -> str:
    """The text without white space, because templates trim contents and put lines around thinking."""
    return "".join(text.split())
