"""Texts between markers in a prompt, so that a model, or a rule, can tell them from the prompt itself.

Every marker has the tag of its prompt, a digest of all marked texts. A text that closes its own markers, or
opens others, would have to contain a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from reflux.models.chat.surrogates import whole_characters

BEGINNING = re.compile(r"^\[\[begin (.+?) #([0-9a-f]{16})\]\]$", re.MULTILINE)


class Marked(NamedTuple):
    # such as "Answer 3"
    label: str
    text: str


def tag_of(texts: Sequence[str]) -> str:
    """The digest of the texts, 16 hex digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def marked(entries: Sequence[Marked], tag: str) -> str:
    """The entries one after the other, each between its markers."""
    return "\n\n".join(
        f"[[begin {label} #{tag}]]\n{whole_characters(text)}\n[[end {label} #{tag}]]"
        for label, text in entries
    )


def read_marked(prompt: str) -> list[Marked]:
    """The marked entries of a prompt, in order. The tag is that of the first marker."""
    found: list[Marked] = []
    first = BEGINNING.search(prompt)
    place, tag = (first.start(), first[2]) if first else (len(prompt), "")
    while begun := BEGINNING.search(prompt, place):
        ending = f"\n[[end {begun[1]} #{tag}]]"
        end = prompt.find(ending, begun.end())
        if end < 0:
            place = begun.end()
            continue
        found.append(Marked(begun[1], prompt[begun.end() + 1 : end]))
        place = end + len(ending)
    return found
