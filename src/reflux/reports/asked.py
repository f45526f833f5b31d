"""Names for the problems of an evaluation. They name the split that the problems come from, so that training
problems are never called held-out problems.
"""

from __future__ import annotations

from collections.abc import Iterable

SPLITS = {"train": "training", "validation": "validation", "test": "test"}


def split_of(value: object) -> str | None:
    """The split that a result of an evaluation records. None if there is none or an unknown one."""
    return value if isinstance(value, str) and value in SPLITS else None


def problems_of(splits: Iterable[str | None], noun: str = "problems") -> str:
    """ "test problems" or "training and test problems"; only "problems" if a split is not known."""
    found = set(splits)
    known = [word for split, word in SPLITS.items() if split in found]
    return f"{' and '.join(known)} {noun}" if known and None not in found else noun


def sentence(splits: Iterable[str | None], noun: str = "problems") -> str:
    """The text of `problems_of` with a capital first letter, for the start of a caption."""
    words = problems_of(splits, noun)
    return words[0].upper() + words[1:]
