"""An answer cut into segments of chosen positions: sentences, lines, arithmetic steps, or blocks of so many
tokens.
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
# A step ends at a newline, after . ; ! ? before white space, or with the result of an equation and the marks
# that close it. A number that goes on being calculated with ("= 3 + 4 = 7": the 3) is no result. Possessive,
# so that no part of a number is taken for all of it.
_STEP = re.compile(
    r"\n|[.;!?](?=\s)|=\s*+[-+−]?\s*+[$€£]?\d++(?:,\d{3})*+(?:\.\d++)?+(?!\s*[-+−*/×·÷^=])[])}>%$€\"'.,;:!?]*"
)


def segments_of(rollout: TokenRollout, way: Way | int) -> list[slice]:
    """Slices of positions, in order, non-empty and disjoint: every chosen position lies in exactly one, any
    other in none.

    A segment never crosses a turn (a run of chosen positions). A number cuts each turn into blocks of so many
    tokens, the last one shorter. Else the text of a turn is cut, and a token belongs to the piece that holds
    its first character which is not white space; a token without one (space, special) joins the piece before
    it, or else the first. "sentences": NLTK's Punkt without training, which knows no abbreviations and needs
    no data. "lines": at newlines. "steps": one arithmetic step each, see `step_starts`. What a length limit
    cut off is a piece like any other. ValueError where a text is to be cut and the rollout has no `spans_T2`.
    """
    if isinstance(way, int):
        return [
            slice(start, min(start + way, stop))
            for first, stop in _turns(rollout.mask_T)
            for start in range(first, stop, way)
        ]
    if rollout.spans_T2 is None:
        raise ValueError(
            f"segments = '{way}' needs the characters that each token wrote, and prompt {rollout.prompt.id} "
            "came without them. "
            f"Ask for them: `Requirements(spans=True)`; or cut by tokens, segments = 8."
        )
    return [
        piece
        for first, stop in _turns(rollout.mask_T)
        for piece in _pieces(rollout, rollout.spans_T2, first, stop, _STARTS[way])
    ]


def sentence_starts(text: str) -> list[int]:
    """Where each sentence begins, in characters."""
    return [start for start, _ in _punkt().span_tokenize(text)]


def line_starts(text: str) -> list[int]:
    """Where each line begins, in characters."""
    return [0, *(found.end() for found in _LINE.finditer(text))]


def step_starts(text: str) -> list[int]:
    """Where each arithmetic step begins: after a newline, after . ; ! ? before white space, and after the
    result of an equation.

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
    """The segments of one turn. A piece that no token begins in has no segment."""
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
