"""What the problems of an evaluation are called: by the split that they come from, so that training problems
are never called held out.
"""

from __future__ import annotations

from collections.abc import Iterable

SPLITS = {"train": "training", "validation": "validation", "test": "test"}


def split_of(value: object) -> str | None:
    """The split that a row of an evaluation records; None where it records none, or one that no task has."""
    return value if isinstance(value, str) and value in SPLITS else None


def problems_of(splits: Iterable[str | None], noun: str = "problems") -> str:
    """ "test problems", "training and test problems"; where the split is not known plainly "problems"."""
    found = set(splits)
    known = [word for split, word in SPLITS.items() if split in found]
    return f"{' and '.join(known)} {noun}" if known and None not in found else noun


def sentence(splits: Iterable[str | None], noun: str = "problems") -> str:
    """The same with a capital letter, as a caption begins."""
    words = problems_of(splits, noun)
    return words[0].upper() + words[1:]
