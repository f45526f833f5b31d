"""Text that a model wrote, made fit to be looked at. It is data: escaping is the template's work, visibility
is this module's.
"""

from __future__ import annotations

import unicodedata

# needed by several scripts and by emoji, and harmless
_JOINERS = "\u200c\u200d"
_PLAIN = "\n\t"


def visible(text: str) -> str:
    """The text with every character that would act instead of being seen written as ⟨U+XXXX⟩.

    These are control characters but newline and tab, format characters (bidirectional overrides, zero-width
    spaces, tags) but the two joiners, line and paragraph separators, and lone surrogates, which UTF-8 cannot
    hold.
    """
    return "".join(_mark(char) if _acts(char) else char for char in text)


def _acts(char: str) -> bool:
    return (
        char not in _PLAIN
        and char not in _JOINERS
        and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )


def _mark(char: str) -> str:
    return f"⟨U+{ord(char):04X}⟩"


def shortened(text: str, limit: int) -> tuple[str, int]:
    """The first `limit` characters and how many were left out."""
    return text[:limit], max(0, len(text) - limit)
