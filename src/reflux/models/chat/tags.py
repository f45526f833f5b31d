"""The tags that a model writes around thinking, tools and answers, and token ids decoded with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from reflux.grading.thinking import NAMES
from reflux.models.chat.template import ChatTemplate

# Such as <think>, </thinking>, [THINK], <seed:think>, <|begin_of_thought|> and <reasoning>.
_NAME = rf"(?:[a-z]+[:_])*(?:{NAMES}|thought|reason)"
_THINKING = re.compile(rf"[^\w\s]+{_NAME}[^\w\s]+", re.IGNORECASE)
# The bracket that begins the tag is part of it, and the end of another token before it is not.
_OPENED = re.compile(rf"([<\[\u25c1][^\w\s/<>\[\]]?{_NAME}[^\w\s]{{1,2}})(\s*)$", re.IGNORECASE)
# Such as <answer> and </answer>. <s> and </s> begin and end a text.
_TAG = re.compile(r"<(/?)(\w{2,})>")


def written_tags(tokenizer: Any) -> dict[int, str]:
    """Id and text of the tags that a model writes, among the tokens that the tokenizer declares special: the
    tags around thinking, and other pairs <x> and </x> that the chat template does not write around turns.
    """
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    paired = {text for text in special.values() if _other(text) in special.values()}
    if paired:
        frames = ChatTemplate(tokenizer).frames
        paired = {text for text in paired if text not in frames}
    return {i: text for i, text in special.items() if _THINKING.fullmatch(text) or text in paired}


def _other(text: str) -> str | None:
    """The tag that makes a pair with `text`; None if `text` is no tag."""
    found = _TAG.fullmatch(text)
    return None if found is None else f"<{'' if found[1] else '/'}{found[2]}>"


def opened_thinking(text: str) -> tuple[str, str]:
    """The tag at the end of `text` that opens thinking, and the white space after it. Both are empty where
    `text` does not end so.
    """
    found = _OPENED.search(text)
    return (found[1], found[2]) if found else ("", "")


class Decoding:
    """Decodes the ids that a model wrote. Special tokens are left out, except `written_tags`: without
    them, thinking and answer could not be told apart in the text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        declared = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        tags = written_tags(tokenizer)
        self.left_out = frozenset((declared | set(tokenizer.all_special_ids)) - set(tags))
        # None: no special token is kept, and the tokenizer itself leaves them out.
        self._kept = frozenset(tags) or None

    def __call__(self, ids: Sequence[int]) -> str:
        if self._kept is None or self._kept.isdisjoint(ids):
            return self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return self.tokenizer.decode([i for i in ids if i not in self.left_out], skip_special_tokens=False)
