"""Answers to the same problems before and after training."""

from __future__ import annotations

from dataclasses import dataclass

from reflux.reports.evals import EvalPoint, main_name
from reflux.reports.formatting import shortened, visible
from reflux.reports.reading import Row, number

CHARACTERS = 4000


@dataclass(frozen=True)
class ExampleAnswer:
    """The student's answer, shortened, and the verdict: right, wrong, or not graded."""

    text: str
    left_out: int
    verdict: str


@dataclass(frozen=True)
class Pair:
    """One problem with its two answers."""

    prompt: str
    question: str
    gold: str
    before: ExampleAnswer
    after: ExampleAnswer


def read_pairs(moments: list[EvalPoint], limit: int = 6) -> tuple[list[Pair], int, int]:
    """The first problems with an answer at both the first and the last evaluation moment, in order, and the
    steps of the two moments.
    """
    kept = [moment for moment in moments if any(moment.examples.values())]
    if len(kept) < 2:
        return [], 0, 0
    first, last = kept[0], kept[-1]
    name = main_name((name for name in first.examples if last.examples.get(name)), "accuracy")
    after = {id_of(entry): entry for entry in last.examples.get(name or "", [])}
    both = [entry for entry in first.examples.get(name or "", []) if id_of(entry) in after]
    return [_pair(entry, after[id_of(entry)]) for entry in both[:limit]], first.step, last.step


def id_of(entry: Row) -> str:
    """The id of an example's problem: its `id`, or its `prompt` if there is no `id`."""
    return words(entry.get("id", entry.get("prompt")))


def _pair(before: Row, after: Row) -> Pair:
    return Pair(
        prompt=id_of(before),
        question=words(before.get("question", before.get("prompt"))),
        gold=words(before.get("answer")),
        before=_answer(before),
        after=_answer(after),
    )


def _answer(entry: Row) -> ExampleAnswer:
    text, left_out = shortened(words(entry.get("text")), CHARACTERS)
    return ExampleAnswer(text, left_out, verdict(entry.get("right", entry.get("verdict"))))


def verdict(value: object) -> str:
    """The verdict as shown on the page: "right" from 0.5 on, "wrong" below, "not graded" without a number."""
    right = number(value)
    return "not graded" if right is None else "right" if right >= 0.5 else "wrong"


def words(value: object) -> str:
    """A value as visible text. None gives an empty text."""
    return "" if value is None else visible(str(value))
