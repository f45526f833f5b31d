"""Texts between markers in a prompt, so that a model, or a rule, can tell them from the prompt itself.

Every marker has the tag of its prompt. No text of the prompt contains the tag, so no text can close its own
markers or open others.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from reflux.models.chat.surrogates import whole_characters

BEGINNING = re.compile(r"^\[\[begin (.+?) #([0-9a-f]{12})\]\]$", re.MULTILINE)


class Marked(NamedTuple):
    # such as "Answer 3"
    label: str
    text: str


def tag_of(texts: Sequence[str]) -> str:
    """12 hex digits that depend on the texts alone and occur in none of them."""
    for number in itertools.count():
        written = json.dumps([number, *texts])
        tag = hashlib.sha256(written.encode()).hexdigest()[:12]
        if not any(tag in text for text in texts):
            return tag
    raise AssertionError("unreachable")


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
        if begun[2] != tag or end < 0:
            place = begun.end()
            continue
        found.append(Marked(begun[1], prompt[begun.end() + 1 : end]))
        place = end + len(ending)
    return found
