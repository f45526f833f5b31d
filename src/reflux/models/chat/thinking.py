"""The tags around thinking, and token ids decoded with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Such as <think>, </thinking>, [THINK], <seed:think>, <|begin_of_thought|> and <reasoning>.
_NAME = r"(?:[a-z]+[:_])*(?:think|thinking|thought|thoughts|reason|reasoning)"
_TAG = re.compile(rf"[^\w\s]+{_NAME}[^\w\s]+", re.IGNORECASE)
_OPENED = re.compile(rf"([^\w\s/]{{1,2}}{_NAME}[^\w\s]{{1,2}})(\s*)$", re.IGNORECASE)


def thinking_tags(tokenizer: Any) -> dict[int, str]:
    """Id and text of the tokens that open or close thinking, among those that the tokenizer declares
    special.
    """
    return {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and _TAG.fullmatch(token.content)
    }


def opened_thinking(text: str) -> tuple[str, str]:
    """The tag at the end of `text` that opens thinking, and the white space after it. Both are empty where
    `text` does not end so.
    """
    found = _OPENED.search(text)
    return (found[1], found[2]) if found else ("", "")


class Decoding:
    """Decodes the ids that a model wrote. Special tokens are left out, except the tags around thinking:
    without them, thinking and answer could not be told apart in the text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        declared = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        tags = thinking_tags(tokenizer)
        self.left_out = frozenset((declared | set(tokenizer.all_special_ids)) - set(tags))
        # None: no special token is kept, and the tokenizer itself leaves them out.
        self._kept = frozenset(tags) or None

    def __call__(self, ids: Sequence[int]) -> str:
        if self._kept is None or self._kept.isdisjoint(ids):
            return self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return self.tokenizer.decode([i for i in ids if i not in self.left_out], skip_special_tokens=False)
