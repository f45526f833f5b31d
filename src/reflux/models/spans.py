"""The characters of a decoded text that each of its tokens wrote. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class CharacterSpans:
    """Which characters of a decoded text each of its tokens wrote. Remembers what single tokens decode to, so
    keep one for a tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.alone: dict[int, str] = {}

    def __call__(self, ids: Sequence[int], text: str | None = None) -> np.ndarray:
        """int64 [T, 2]: characters [start, end) of `text` that each token wrote; text is what `ids` decode to
        without special tokens.

        The spans rise and cover the text. A token that wrote nothing (special tokens) has start = end. Tokens
        whose text only a later one settles, such as the bytes of one character, all have the span of the
        whole; bytes that never become a character have the replacement character that stands for them in the
        text, the first of them where one stands for several. Empty ids: shape [0, 2].
        """
        text = self.decode(ids) if text is None else text
        pieces = [self.alone[i] if i in self.alone else self._remember(i) for i in ids]
        if "".join(pieces) == text:
            # nothing depends on its neighbours, as in byte-level tokens that are whole characters
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            return (
                np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
                if len(ends)
                else np.zeros((0, 2), dtype=np.int64)
            )
        return np.asarray(self._settled(list(ids), text), dtype=np.int64).reshape(-1, 2)

    def of_turns(self, turns: Sequence[tuple[Sequence[int], str, int]]) -> np.ndarray:
        """Those of several turns (ids, text, how many heard ids follow) in their texts one line apart. Heard
        ids wrote nothing.
        """
        offset, parts = 0, [np.zeros((0, 2), dtype=np.int64)]
        for ids, text, unsampled in turns:
            parts += [
                self(ids, text) + offset,
                np.full((unsampled, 2), offset + len(text), dtype=np.int64),
            ]
            offset += len(text) + 1
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _remember(self, token: int) -> str:
        self.alone[token] = self.decode([token])
        return self.alone[token]

    def _settled(self, ids: list[int], text: str, local: bool = True) -> list[tuple[int, int]]:
        """The same by decoding token after token. A block of tokens is settled once what it adds is what the
        text holds there.

        Decoding starts one block back, for some decoders drop a space at the start or join words. Where that
        does not lead on, what a token says depends on tokens far before it, and every decoding starts with
        the first (`local` False).
        """
        spans: list[tuple[int, int]] = []
        # known: what ids[anchor:len(spans)] decode to; done: characters that are settled
        anchor, known, done = 0, "", 0
        for stop in range(1, len(ids) + 1):
            if local and stop - len(spans) > _LONG_BLOCK:
                return self._settled(ids, text, local=False)
            whole = self.decode(ids[anchor:stop])
            added = whole[len(known) :]
            if not (whole.startswith(known) and text.startswith(added, done)):
                continue
            settled, end = len(spans), done + len(added)
            spans += [(done, end)] * (stop - settled)
            done = end
            if local and added.strip():
                # a block of white space is no ground to start from
                anchor, known = settled, self.decode(ids[settled:stop])
            else:
                known = whole
        return spans + [(done, len(text))] * (len(ids) - len(spans))


# tokens; a character has at most four bytes
_LONG_BLOCK = 8
