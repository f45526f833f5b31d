"""Sums that the student gives to a calculator, one operation a turn.

"Work out 7 +5 *3 -4 from left to right. Ask calc(A+B), then write Answer: N."  ->
"calc(7+5)", reply "12"; "calc(12*3)", reply "36"; "calc(36-4)", reply "32"; "Answer: 32"
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.tasks.arithmetic import SIGNS, Chain, Operation, apply
from reflux.tasks.tools import Calls, Game, ToolTask

# Of at most six digits each, so a product is not long.
OPERATION = re.compile(r"\s*([0-9]{1,6})\s*([-+*])\s*([0-9]{1,6})\s*")
KINDS: dict[str, Operation] = {sign: kind for kind, sign in SIGNS.items()}
LARGEST_FACTOR = 5


@dataclass(frozen=True, config=STRICT)
class Calculator(ToolTask):
    """`min_steps` to `max_steps` operations from left to right, each by a call calc(A+B), calc(A-B) or
    calc(A*B) with whole numbers, one call a turn; then "Answer: N".

    No number is above `largest`, and no result is below 0. A turn without exactly one call, and a call that
    cannot be computed, get a reply that begins with "Error:". The attempt ends after 10 turns, and only 6
    calls get a result.
    """

    kind: ClassVar[str] = "calculator"

    # the smallest number of operations
    min_steps: Annotated[int, Field(ge=1)] = 2
    # the largest number of operations
    max_steps: Annotated[int, Field(le=6)] = 3
    # the largest number that a problem or a result may contain
    largest: Annotated[int, Field(ge=10)] = 99

    def __post_init__(self) -> None:
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps = {self.min_steps} is above max_steps = {self.max_steps}. Raise max_steps"
            )

    def draw(self, rng: random.Random) -> Chain | None:
        value = first = rng.randint(2, min(20, self.largest))
        steps: list[tuple[Operation, int]] = []
        for _ in range(rng.randint(self.min_steps, self.max_steps)):
            kind = rng.choice(list(SIGNS))
            number = rng.randint(2, LARGEST_FACTOR if kind == "mul" else min(20, self.largest))
            steps.append((kind, number))
            value = apply(kind, value, number)
            if not 0 <= value <= self.largest:
                return None
        return first, tuple(steps)

    def ask(self, problem: Chain) -> tuple[str, str]:
        value, steps = problem
        told = " ".join([str(value), *(f"{SIGNS[kind]}{number}" for kind, number in steps)])
        for kind, number in steps:
            value = apply(kind, value, number)
        return f"Work out {told} from left to right. Ask calc(A+B), then write Answer: N.", str(value)

    def game(self, problem: Chain, step: int) -> Game:
        return Calls({"calc": computed}, "calc(A+B)")

    def turn(self, problem: Chain, replies: Sequence[str]) -> str:
        value = replies[-1] if replies else str(problem[0])
        if len(replies) == len(problem[1]):
            return f"Answer: {value}"
        kind, number = problem[1][len(replies)]
        return f"calc({value}{SIGNS[kind]}{number})"


def computed(text: str) -> str:
    """The result of one operation, or an error."""
    found = OPERATION.fullmatch(text)
    if found is None:
        return "Error: give A+B, A-B or A*B"
    return str(apply(KINDS[found[2]], int(found[1]), int(found[3])))
