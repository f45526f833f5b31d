"""Finds the characters of a decoded text that each of its tokens wrote. It does not need torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reflux.models.blocks import far, near
from reflux.models.byte_rows import units_of
from reflux.models.chat.tags import Decoding


class CharacterSpans:
    """Finds which characters of a decoded text each of its tokens wrote. It caches the texts of single
    tokens, so use one object per tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        decoder = Decoding(tokenizer)
        self.decode, self.left_out = decoder, decoder.left_out
        self.alone: dict[int, str] = {}

    def __call__(self, ids: Sequence[int], text: str | None = None) -> np.ndarray:
        """int64 [T, 2]: characters [start, end) of `text` that each token wrote. text is the decoded text
        of `ids` (`Decoding`).

        The spans are in rising order and cover the text. A token that wrote nothing (special tokens) has
        start = end. Where only a later token completes the text of some tokens, such as the bytes of one
        character, all of these tokens have the span of the whole. Bytes that never complete a character
        have the span of the replacement character that stands for them in the text; where several
        replacement characters stand for them, the span of the first. Empty ids give shape [0, 2].
        """
        text = self.decode(ids) if text is None else text
        pieces = [self.alone[i] if i in self.alone else self._remember(i) for i in ids]
        if "".join(pieces) == text:
            # No token's text depends on its neighbours, as with byte-level tokens that are whole characters.
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            return (
                np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
                if len(ends)
                else np.zeros((0, 2), dtype=np.int64)
            )
        return np.asarray(self._settled(list(ids), text), dtype=np.int64).reshape(-1, 2)

    def of_turns(self, turns: Sequence[tuple[Sequence[int], str, int]]) -> np.ndarray:
        """The spans of several turns (ids, text, number of unsampled ids that follow), in their texts
        joined by newlines. Unsampled ids wrote nothing.
        """
        offset, parts = 0, [np.zeros((0, 2), dtype=np.int64)]
        for ids, text, unsampled in turns:
            parts += [self(ids, text) + offset, np.full((unsampled, 2), offset + len(text), dtype=np.int64)]
            offset += len(text) + 1
        return np.concatenate(parts)

    def _remember(self, token: int) -> str:
        self.alone[token] = self.decode([token])
        return self.alone[token]

    def _settled(self, ids: list[int], text: str) -> list[tuple[int, int]]:
        """The same spans, block by block: first with a few tokens before each block, and where the text of a
        token depends on tokens far before it, from the first token on.
        """
        units = units_of(self.tokenizer, self.left_out, ids)
        spans = near(self.decode, ids, units, text)
        return far(self.decode, ids, text) if spans is None else spans
