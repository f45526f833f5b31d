"""Settles blocks of tokens: finds the characters that a block adds to a decoded text. The number of tokens
that are decoded in all grows in proportion to the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

Span = tuple[int, int]
Decode = Callable[[Sequence[int]], str]

# A block of more tokens is too long to be one character, which has at most four bytes.
_LONG_BLOCK = 8
# Most decodings that start with the first token.
_FROM_START = 128


def near(
    decode: Decode, ids: Sequence[int], units: Sequence[Sequence[int | None]], text: str
) -> list[Span] | None:
    """The spans of the tokens. A block of units is settled when the characters that it adds are those of the
    text at that point. None where some block cannot be settled.

    Decoding starts one block earlier, because some decoders drop a space at the start or join words. A block
    of white space, which a decoder may drop, follows the last block that has more.
    """
    spans: list[Span] = []
    before: Sequence[int] = []
    solid: Sequence[int] = []
    known, done, stop, block = "", 0, 0, 0
    for unit in units:
        stop, block = stop + len(unit), block + 1
        if block > _LONG_BLOCK:
            return None
        new = ids[len(spans) : stop]
        whole = decode([*before, *new])
        added = whole[len(known) :]
        if not (whole.startswith(known) and text.startswith(added, done)):
            continue
        spans += _shared(unit if block == 1 else (), added, done, len(new))
        done += len(added)
        ended = new[-_LONG_BLOCK:]
        before = ended if added.strip() or not solid else [*solid, *ended]
        solid = ended if added.strip() or not solid else solid
        known, block = decode(before), 0
    return spans + [(done, len(text))] * (len(ids) - len(spans))


def far(decode: Decode, ids: Sequence[int], text: str) -> list[Span]:
    """The spans of the tokens, where every decoding starts with the first one. Long texts are settled in
    longer blocks, so that the number of decodings is bounded.
    """
    spans: list[Span] = []
    known, done, step = "", 0, 1 + len(ids) // _FROM_START
    for stop in range(step, len(ids) + 1, step):
        whole = decode(ids[:stop])
        added = whole[len(known) :]
        if whole.startswith(known) and text.startswith(added, done):
            spans += [(done, done + len(added))] * (stop - len(spans))
            known, done = whole, done + len(added)
    return spans + [(done, len(text))] * (len(ids) - len(spans))


def _shared(unit: Sequence[int | None], added: str, done: int, count: int) -> Iterator[Span]:
    """The spans of the `count` tokens of a block that adds the characters `added` after `done` others. Bytes
    have the span of their character, or of their own replacement character; other tokens the whole block.
    """
    widths = _widths([byte for byte in unit if byte is not None], added)
    if not widths:
        yield from [(done, done + len(added))] * count
        return
    # The character of each byte; a token that is left out has that of the byte before it.
    places = [place for place, width in enumerate(widths) for _ in range(width)]
    counted = -1
    for byte in unit:
        counted += byte is not None
        start = done + places[counted]
        # After the last byte of a character, a token that is left out wrote nothing.
        closed = byte is None and (counted + 1 == len(places) or places[counted + 1] != places[counted])
        yield (start + 1, start + 1) if closed else (start, start + 1)


def _widths(found: Sequence[int], added: str) -> list[int]:
    """How many of the bytes each character of `added` stands for; [] where that is not known."""
    raw = bytes(found)
    if raw == added.encode():
        return [len(char.encode()) for char in added]
    return [1] * len(raw) if len(raw) == len(added) else []
