"""Generates problems whose worked answer is long and begins with a plan: which quantities lead from the one
that is asked for to the one that is given.

"K has 3 less than B. A has 12. M has 4 more than A. B has 5 more than A. How many has K?"  ->
"K needs B. B needs A. A is given. A = 12. B = A + 5 = 12 + 5 = 17. K = B - 3 = 17 - 3 = 14. Answer: 14"

A wrong quantity in the plan makes every later sentence compute something that was not asked for.
"""

from __future__ import annotations

import random
from itertools import pairwise
from string import ascii_uppercase as LETTERS
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.tasks.arithmetic import SIGNS, ArithmeticTask, Chain, Operation, apply, numbers

WORDS: dict[Operation, str] = {"add": "more than", "sub": "less than", "mul": "times as many as"}


@dataclass(frozen=True, config=STRICT)
class Chains(ArithmeticTask):
    """Quantities that are defined by one another, in random order. `min_steps` to `max_steps` operations lead
    from the one that is given to the one that is asked for, and no number is above `largest` or below 0.

    `Prompt.references` has the worked solution: first the plan, from the quantity that is asked for to the
    given one, then every value in the opposite order. With the default settings it has 160 to 340 characters.
    `Prompt.route` is that of the task `word_problems`.
    """

    kind: ClassVar[str] = "chains"

    min_steps: int = 4
    max_steps: int = 8
    # the number of further quantities, which the answer does not need
    distractors: Annotated[int, Field(ge=0)] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        quantities = self.most_steps + 1 + self.distractors
        if quantities > len(LETTERS):
            raise ValueError(
                f"max_steps, longer and distractors need {quantities} quantities, and there are "
                f"{len(LETTERS)} letters to name them"
            )

    def tell(self, chain: Chain, rng: random.Random) -> tuple[str, str, int]:
        value, steps = chain
        letters = rng.sample(LETTERS, len(steps) + 1 + self.distractors)
        path, others = letters[: len(steps) + 1], letters[len(steps) + 1 :]
        values, facts, told = {path[0]: value}, [f"{path[0]} has {value}."], [f"{path[0]} = {value}."]
        for (kind, number), (before, name) in zip(steps, pairwise(path), strict=True):
            sign, start, value = SIGNS[kind], value, apply(kind, value, number)
            facts.append(fact(name, kind, number, before))
            told.append(f"{name} = {before} {sign} {number} = {start} {sign} {number} = {value}.")
            values[name] = value
        for name in others:
            facts.append(self._distractor(name, values, rng))
        rng.shuffle(facts)
        back = path[::-1]
        plan = [f"{name} needs {before}." for name, before in pairwise(back)]
        problem = " ".join([*facts, f"How many has {back[0]}?"])
        return problem, " ".join([*plan, f"{path[0]} is given.", *told, f"Answer: {value}"]), value

    def _distractor(self, name: str, values: dict[str, int], rng: random.Random) -> str:
        """A sentence that defines a new quantity `name` by one of `values`, to which it is added."""
        before = rng.choice(list(values))
        kinds: list[Operation] = [kind for kind in self.operations if values[before] or kind != "mul"]
        ranges: dict[Operation, tuple[int, int]] = {
            kind: numbers(kind, values[before], 0, self.largest) for kind in kinds
        }
        fitting: list[Operation] = [kind for kind, (least, most) in ranges.items() if least <= most]
        if not fitting:
            values[name] = rng.randint(2, self.largest)
            return f"{name} has {values[name]}."
        kind = rng.choice(fitting)
        number = rng.randint(*ranges[kind])
        values[name] = apply(kind, values[before], number)
        return fact(name, kind, number, before)


def fact(name: str, kind: Operation, number: int, before: str) -> str:
    """The sentence that defines the quantity `name` by the quantity `before`."""
    return f"{name} has {number} {WORDS[kind]} {before}."
