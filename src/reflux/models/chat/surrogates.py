"""Texts that have halves of surrogate pairs. JSON can spell them, but no UTF-8 file and no tokenizer takes
them.
"""

from __future__ import annotations


def whole_characters(text: str) -> str:
    """`text` with U+FFFD in place of each half of a surrogate pair. Two halves that belong together become
    their character. All other texts stay unchanged.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
