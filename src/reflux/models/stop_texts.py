"""Finds where a stop text ends in the text of a row, while the row is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reflux.models.chat.tags import Decoding

# tokens before a stop text that are decoded with it: a decoder may drop a space at the start of a text, and
# special tokens write nothing
_MARGIN_TOKENS = 16


class StopTexts:
    """The stop texts of one sampling call. They may begin and end inside tokens and span several of them.

    A stop text that is exactly a special token of the tokenizer is compared by id, because most special
    tokens are not part of a decoded text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.decode = Decoding(tokenizer)
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids = frozenset(special[text] for text in stop if text in special)
        self.texts = tuple(text for text in stop if text not in special)
        # A token writes at least one byte, except for special tokens.
        self.window = max((len(text.encode()) for text in self.texts), default=0) + _MARGIN_TOKENS

    def beyond(self, tokens: Sequence[int]) -> int | None:
        """The number of characters that the last token wrote after the end of a stop text. None if no stop
        text has ended. tokens: the tokens of the row so far. Without the last one no stop text had ended.
        """
        if tokens[-1] in self.ids:
            return 0
        text = self.decode(tokens[-self.window :])
        places = ((text.find(stop), len(stop)) for stop in self.texts)
        ends = [place + length for place, length in places if place >= 0]
        return len(text) - min(ends) if ends else None
