"""Segments of an answer: every chosen position in exactly one, whatever is written and however it is spelt in
tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflux.credit.segments import line_starts, segments_of, sentence_starts, step_starts
from reflux.types import TokenRollout
from tiny import rollout

WAYS = ["sentences", "lines", "steps"]
LATEX = (
    "We have $x = \\frac{3.5}{2}$. Then\n\\[ y = 1.75 \\]\nSo $y=1.75$! Is it? "
    "你好。世界 😀 wie schön. \n\n  It is"
)


def spelt(turns: list[list[str]], objective_teachers: int = 0) -> TokenRollout:
    """A rollout whose turns are these pieces of text, one a token, with `heard` unchosen positions after each
    turn but the last.
    """
    mask: list[bool] = []
    spans: list[tuple[int, int]] = []
    for index, pieces in enumerate(turns):
        at = sum(len("".join(turn)) + 1 for turn in turns[:index])
        for piece in pieces:
            spans.append((at, at + len(piece)))
            at += len(piece)
        unchosen = objective_teachers if index + 1 < len(turns) else 0
        mask += [True] * len(pieces) + [False] * unchosen
        spans += [(at, at)] * unchosen
    text = "\n".join("".join(turn) for turn in turns)
    found = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    return dataclasses.replace(rollout(len(mask), mask=mask), text=text, spans_T2=found)


def words(made: TokenRollout, way: Any) -> list[str]:
    """The text of each segment."""
    assert made.spans_T2 is not None
    return ["".join(made.text[a:b] for a, b in made.spans_T2[piece]) for piece in segments_of(made, way)]


def assert_covering(made: TokenRollout, pieces: list[slice]) -> None:
    """Ordered, non-empty, disjoint, all of the chosen positions and no other; never across a turn."""
    places = [place for piece in pieces for place in range(piece.start, piece.stop)]
    assert places == np.flatnonzero(made.mask_T).tolist()
    assert all(piece.start < piece.stop for piece in pieces)


def by_definition(made: TokenRollout, way: str) -> list[int]:
    """Which segment each chosen position lies in, from the rule as it is written, a character at a time."""
    assert made.spans_T2 is not None
    starts_of = {"sentences": sentence_starts, "lines": line_starts, "steps": step_starts}[way]
    found: list[int] = []
    runs = "".join("x" if chosen else " " for chosen in made.mask_T)
    at = 0
    for run in runs.split():
        first = runs.index(run, at)
        at = first + len(run)
        spans = made.spans_T2[first:at]
        begin, text = spans[0, 0], made.text[spans[0, 0] : spans[:, 1].max()]
        owners: list[int | None] = []
        for a, b in spans:
            spoken = [c for c in range(a, b) if not made.text[c].isspace()]
            owners.append(sum(start <= spoken[0] - begin for start in starts_of(text)) if spoken else None)
        for index, owner in enumerate(owners):
            before = [o for o in owners[:index] if o is not None]
            after = [o for o in owners if o is not None]
            owners[index] = owner if owner is not None else before[-1] if before else after[0] if after else 0
        changes = np.cumsum([0, *(one != other for one, other in itertools.pairwise(owners))])
        found += (changes + (found[-1] + 1 if found else 0)).tolist()
    return found


@pytest.mark.parametrize("way", [*WAYS, 1, 3, 100])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_chosen_position_lies_in_exactly_one_segment(way: Any, data: st.DataObject) -> None:
    """Identity 11: LaTeX, newlines, multi-byte text and a cut end, in pieces of any length, over any number
    of turns.
    """
    turns = []
    for _ in range(data.draw(st.integers(1, 3))):
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(LATEX))] * 2)))
        cuts = data.draw(
            st.lists(st.integers(start, stop), min_size=(stop - start) // 6, max_size=stop - start)
        )
        # equal ones make empty pieces
        places = [start, *sorted(cuts), stop]
        # an end token
        turns.append([*(LATEX[a:b] for a, b in itertools.pairwise(places)), ""])
    made = spelt(turns, objective_teachers=data.draw(st.integers(1, 3)))
    pieces = segments_of(made, way)
    assert_covering(made, pieces)
    if isinstance(way, str):
        owner = [index for index, piece in enumerate(pieces) for _ in range(piece.start, piece.stop)]
        assert owner == by_definition(made, way)


@pytest.mark.parametrize("way", [*WAYS, 1, 8])
def test_nothing_chosen_has_no_segment_and_one_token_has_one(way: Any) -> None:
    assert segments_of(spelt([[]]), way) == []
    assert segments_of(dataclasses.replace(spelt([["a"]]), mask_T=np.array([False])), way) == []
    for piece in ("a", " ", "", "\n", "."):
        assert segments_of(spelt([[piece]]), way) == [slice(0, 1)]
    assert segments_of(spelt([["", " ", "\n", ""]]), "lines") == [slice(0, 4)]


def test_a_token_belongs_to_the_sentence_of_its_first_character_that_is_no_space() -> None:
    made = spelt([[" ", "One", ".", " Two", ". Three", " is", ".", "\n", "", " Fo", "ur"]])
    assert words(made, "sentences") == [" One.", " Two. Three", " is.\n", " Four"]
    # ". Three" begins with the full stop of Two; " is" is the first token of the third sentence; "\n" and the
    # special one join it


def test_an_off_by_one_would_show_here() -> None:
    """One character per token: the space before a sentence belongs to the previous sentence."""
    made = spelt([list("Ab cd. Ef gh. Ij")])
    assert segments_of(made, "sentences") == [slice(0, 7), slice(7, 14), slice(14, 16)]
    assert segments_of(spelt([list("a\n\nbc\nd")]), "lines") == [slice(0, 3), slice(3, 6), slice(6, 7)]


def test_a_character_of_several_tokens_is_not_torn_apart() -> None:
    made = spelt([["a", ".", " ", "你", "好"]])
    spans = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [3, 4], [3, 4], [4, 5]])
    torn = dataclasses.replace(rollout(7), text=made.text, spans_T2=spans)
    assert segments_of(torn, "sentences") == [slice(0, 3), slice(3, 7)]


def test_a_segment_never_crosses_a_turn() -> None:
    """One line over two turns is two segments, and what was said between belongs to neither."""
    made = spelt([["one", " and"], ["more", "\n", "end"]], objective_teachers=2)
    assert segments_of(made, "lines") == [slice(0, 2), slice(4, 6), slice(6, 7)]
    assert segments_of(made, "sentences") == [slice(0, 2), slice(4, 7)]
    assert segments_of(made, 2) == [slice(0, 2), slice(4, 6), slice(6, 7)]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Start: 12. 12+7=19. 19-5=14. Answer: 14", ["Start: 12.", "12+7=19.", "19-5=14.", "Answer: 14"]),
        ("3*4=12\n12-5=7\nAnswer: 7", ["3*4=12", "12-5=7", "Answer: 7"]),
        ("3+4=7, 7*2=14", ["3+4=7,", "7*2=14"]),
        ("So 3+4=7 and 7*2=14 apples", ["So 3+4=7", "and 7*2=14", "apples"]),
        ("2+3 = 10/2 = 5. Done", ["2+3 = 10/2 = 5.", "Done"]),
        (
            "48/2 = <<48/2=24>>24 clips. Then 1.5*2=3.0! x",
            ["48/2 = <<48/2=24>>", "24 clips.", "Then 1.5*2=3.0!", "x"],
        ),
        ("$1,200-1 = $1,199$ is it", ["$1,200-1 = $1,199$", "is it"]),
        ("1 - 3 = -2 so x=34+5", ["1 - 3 = -2", "so x=34+5"]),
        ("x = 3.5*2=7", ["x = 3.5*2=7"]),
        ("Because x+", ["Because x+"]),
    ],
)
def test_steps_are_single_calculations(text: str, steps: list[str]) -> None:
    starts = step_starts(text)
    found = [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert [step for step in found if step] == steps


def test_sentences_are_those_of_punkt() -> None:
    text = 'He said "go." Then left?! 3.5 is a number. the end'
    starts = sentence_starts(text)
    assert [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)] == [
        'He said "go."', "Then left?!", "3.5 is a number.", "the end",
    ]  # fmt: skip


def test_text_without_spans_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"prompt p0 has none recorded\. Add `Requirements\(spans=True\)`"):
        segments_of(rollout(3), "lines")
    assert segments_of(rollout(3), 2) == [slice(0, 2), slice(2, 3)]
