"""The token ids of a text that continues another one."""

from __future__ import annotations

from typing import Any

# Texts that a following text rarely forms a token with.
_ANCHORS = ("\n", ".", "a", "0")


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text` without the tokens that the tokenizer adds around every text."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def begin_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before every text by itself. What it puts behind a text, such as an
    end token, is not among them.
    """
    around, inside = tokenizer("a")["input_ids"], bare_ids(tokenizer, "a")
    places = range(len(around) - len(inside) + 1)
    return next((around[:place] for place in places if around[place : place + len(inside)] == inside), [])


def continued_ids(tokenizer: Any, before: str, text: str) -> list[int]:
    """The ids of `text` as the tokenizer writes them behind `before`.

    Some tokenizers put a space before every text (SentencePiece). So the whole is tokenised, and the ids of
    `before` are cut off. Where a token crosses the border, the ids of `before` are fixed all the same; then
    `text` is tokenised behind a text that it forms no token with.
    """
    for start in (before, *_ANCHORS):
        known = bare_ids(tokenizer, start)
        if start is not before and (not known or tokenizer.unk_token_id in known):
            continue
        whole = bare_ids(tokenizer, start + text)
        if whole[: len(known)] == known:
            return whole[len(known) :]
    return bare_ids(tokenizer, text)
