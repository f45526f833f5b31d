"""A balance that the student keeps over many turns: the environment gives the entries one by one.

"Start with 10. Write the balance after each entry. First +5."  ->
"10+5=15", reply "-3"; "15-3=12", reply "+8"; ... "9+4=13", reply "Answer?"; "Answer: 13"
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.tasks.arithmetic import SIGNS, Chain, Operation, apply
from reflux.tasks.tools import END, Game, ToolTask

ENTRIES: tuple[Operation, ...] = ("add", "sub")
# An entry has one digit.
LARGEST_ENTRY = 9
ASKED = "Answer?"


@dataclass(frozen=True, config=STRICT)
class Ledger(ToolTask):
    """`min_entries` to `max_entries` entries that are added to a balance or subtracted from it, one a turn.
    After the last one the environment asks "Answer?", and the student writes "Answer: N". An attempt with k
    entries has k + 1 turns.

    The first entry is in the question; the others are not known before they come. No balance is above
    `largest` or below 0. What the student writes between is not judged. An answer before it is asked for
    ends the attempt.
    """

    kind: ClassVar[str] = "ledger"

    # the smallest number of entries
    min_entries: Annotated[int, Field(ge=1)] = 7
    # the largest number of entries
    max_entries: int = 11
    # the largest balance
    largest: Annotated[int, Field(ge=10)] = 40

    def __post_init__(self) -> None:
        if self.min_entries > self.max_entries:
            raise ValueError(
                f"min_entries = {self.min_entries} is above max_entries = {self.max_entries}. Raise "
                "max_entries"
            )

    def draw(self, rng: random.Random) -> Chain:
        value = first = rng.randint(5, min(20, self.largest))
        steps: list[tuple[Operation, int]] = []
        for _ in range(rng.randint(self.min_entries, self.max_entries)):
            # At least one of both is possible, because `largest` is above the largest entry.
            number = rng.randint(1, LARGEST_ENTRY)
            possible = {"add": value + number <= self.largest, "sub": value >= number}
            kind: Operation = rng.choice([entry for entry in ENTRIES if possible[entry]])
            steps.append((kind, number))
            value = apply(kind, value, number)
        return first, tuple(steps)

    def ask(self, problem: Chain) -> tuple[str, str]:
        first, steps = problem
        question = f"Start with {first}. Write the balance after each entry. First {_entry(steps[0])}."
        return question, str(_balance(problem, len(steps)))

    def game(self, problem: Chain, step: int) -> Game:
        return Entries([_entry(entry) for entry in problem[1][1:]])

    def turn(self, problem: Chain, replies: Sequence[str]) -> str:
        done = len(replies)
        if done == len(problem[1]):
            return f"Answer: {_balance(problem, done)}"
        before, after = (_balance(problem, count) for count in (done, done + 1))
        return f"{before}{_entry(problem[1][done])}={after}"


class Entries:
    """The game that gives these entries, asks for the answer, and ends with it."""

    def __init__(self, entries: Sequence[str]):
        self._replies = iter([*entries, ASKED])

    def reply(self, text: str) -> str | None:
        return None if END in text else next(self._replies, None)


def _entry(entry: tuple[Operation, int]) -> str:
    kind, number = entry
    return f"{SIGNS[kind]}{number}"


def _balance(problem: Chain, entries: int) -> int:
    """The balance after so many of the entries."""
    value, steps = problem
    for kind, number in steps[:entries]:
        value = apply(kind, value, number)
    return value
