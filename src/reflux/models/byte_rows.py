"""Rows of tokens that each stand for one byte. A decoder reads a row as a whole."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def units_of(tokenizer: Any, left_out: Collection[int], ids: Sequence[int]) -> list[list[int | None]]:
    """`ids` in units that decoders read as a whole: a token, or tokens of single bytes ("<0xE2>") in a row.
    Of each token it gives the byte, else None. Tokens that decoding leaves out do not divide a row of bytes.
    """
    known = {i: _byte(tokenizer, i) for i in set(ids) - set(left_out)}
    units: list[list[int | None]] = []
    # The tokens since the last byte, all of which decoding leaves out; None outside a row of bytes.
    skipped: int | None = None
    for i in ids:
        byte = known.get(i)
        if byte is not None and skipped is not None:
            row = units[-1 - skipped]
            del units[len(units) - skipped :]
            row += [*[None] * skipped, byte]
        else:
            units.append([byte])
        skipped = 0 if byte is not None else skipped + 1 if i in left_out and skipped is not None else None
    return units


def _byte(tokenizer: Any, token: int) -> int | None:
    found = _BYTE.fullmatch(tokenizer.convert_ids_to_tokens(token) or "")
    return int(found[1], 16) if found else None
