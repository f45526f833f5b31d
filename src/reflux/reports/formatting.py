"""Makes text that a model wrote fit for display. This module makes invisible characters visible; the template
does the HTML escaping.
"""

from __future__ import annotations

import unicodedata

# the two joiners are harmless, and several scripts and emoji need them
_JOINERS = "\u200c\u200d"
_PLAIN = "\n\t"


def visible(text: str) -> str:
    """The text with every control or format character written as ⟨U+XXXX⟩.

    These are control characters except newline and tab, format characters (bidirectional overrides,
    zero-width spaces, tags) except the two joiners, line and paragraph separators, and lone surrogates, which
    UTF-8 cannot encode.
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
