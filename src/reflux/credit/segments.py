"""Cuts an answer into segments of chosen positions: sentences, lines, arithmetic steps, or blocks of a given
number of tokens.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np

from reflux.types import TokenRollout

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

Way = Literal["sentences", "lines", "steps"]

_LINE = re.compile(r"\n")
# A step ends at a newline, after . ; ! ? before white space, or after the result of an equation and the marks
# that follow it. A number with which the calculation goes on ("= 3 + 4 = 7": the 3) is not a result. The
# quantifiers are possessive, so that a part of a number is never taken for the whole number.
_STEP = re.compile(
    r"\n|[.;!?](?=\s)|=\s*+[-+−]?\s*+[$€£]?\d++(?:,\d{3})*+(?:\.\d++)?+"
    r"(?!\s*[-+−*/×·÷^=])[])}>%$€\"'.,;:!?]*"
)


def segments_of(rollout: TokenRollout, way: Way | int) -> list[slice]:
    """Slices of positions, in order, non-empty and disjoint. Every chosen position lies in exactly one slice,
    and no other position lies in a slice. way: how the answer is cut.

    A segment never crosses a turn (a run of chosen positions). A number cuts each turn into blocks of so many
    tokens; the last block may be shorter. Otherwise the text of a turn is cut into pieces. A token belongs to
    the piece with its first character that is not white space. A token without such a character (space,
    special token) belongs to the piece before it, or else to the first piece. "sentences": cut by NLTK's
    Punkt without training, which knows no abbreviations and needs no data. "lines": cut at newlines. "steps":
    cut into arithmetic steps, see `step_starts`. A piece that the length limit cut off counts as a piece.
    Raises ValueError if a text must be cut and the rollout has no `spans_T2`.
    """
    if isinstance(way, int):
        return [
            slice(start, min(start + way, stop))
            for first, stop in _turns(rollout.mask_T)
            for start in range(first, stop, way)
        ]
    if rollout.spans_T2 is None:
        raise ValueError(
            f"segments = '{way}' needs the characters of each token, and the rollout of prompt "
            f"{rollout.prompt.id} has none recorded. Add `Requirements(spans=True)` to the `requirements` of "
            "the part, or cut by tokens with segments = 8."
        )
    return [
        piece
        for first, stop in _turns(rollout.mask_T)
        for piece in _pieces(rollout, rollout.spans_T2, first, stop, _STARTS[way])
    ]


def sentence_starts(text: str) -> list[int]:
    """The index of the first character of each sentence."""
    return [start for start, _ in _punkt().span_tokenize(text)]


def line_starts(text: str) -> list[int]:
    """The index of the first character of each line."""
    return [0, *(found.end() for found in _LINE.finditer(text))]


def step_starts(text: str) -> list[int]:
    """The index of the first character of each arithmetic step. A step begins after a newline, after . ; ! ?
    before white space, and after the result of an equation.

    "Start: 12. 12+7=19. 19-5=14. Answer: 14" has four, "3+4=7, 7*2=14" two, "2+3 = 10/2 = 5" one.
    """
    return [0, *(found.end() for found in _STEP.finditer(text))]


_STARTS: dict[str, Callable[[str], list[int]]] = {
    "sentences": sentence_starts,
    "lines": line_starts,
    "steps": step_starts,
}


@functools.cache
def _punkt() -> PunktSentenceTokenizer:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer()


def _turns(mask_T: np.ndarray) -> list[tuple[int, int]]:
    """(first, stop) of each run of chosen positions."""
    edges = np.flatnonzero(np.diff(mask_T.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _pieces(
    rollout: TokenRollout, spans_T2: np.ndarray, first: int, stop: int, starts_of: Callable[[str], list[int]]
) -> list[slice]:
    """The segments of one turn. A piece in which no token begins has no segment."""
    spans = spans_T2[first:stop].tolist()
    begin, end = spans[0][0], max(after for _, after in spans)
    text = rollout.text[begin:end]
    starts = starts_of(text)
    seen = [place for place, char in enumerate(text, begin) if not char.isspace()]
    cuts, owner = [first], None
    for position, (start, after) in enumerate(spans, first):
        place = bisect.bisect_left(seen, start)
        if place == len(seen) or seen[place] >= after:
            continue
        piece = bisect.bisect_right(starts, seen[place] - begin)
        if owner is not None and piece != owner:
            cuts.append(position)
        owner = piece
    return [slice(*pair) for pair in zip(cuts, [*cuts[1:], stop], strict=True)]
