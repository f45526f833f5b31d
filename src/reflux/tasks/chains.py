"""Generates problems whose worked answer is long and begins with a plan: which quantities lead from the one
that is asked for to the one that is given.

"K=B-3. A=12. M=A+4. B=A+5. K?"  ->
"K=B-3. B=A+5. A=12. So A=12. B=12+5=17. K=17-3=14. Answer: 14"

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


@dataclass(frozen=True, config=STRICT)
class Chains(ArithmeticTask):
    """Quantities that are defined by one another, in random order. `min_steps` to `max_steps` operations lead
    from the one that is given to the one that is asked for, and no number is above `largest` or below 0.

    `Prompt.references` has the worked solution: first the plan, which repeats the sentences that lead from
    the quantity that is asked for to the given one, then every value in the opposite order. With the default
    settings it has 150 to 300 characters. `Prompt.route` is that of the task `word_problems`.
    """

    kind: ClassVar[str] = "chains"

    min_steps: int = 8
    max_steps: int = 14
    largest: int = 30
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
        values, facts, told = {path[0]: value}, [f"{path[0]}={value}."], [f"{path[0]}={value}."]
        for (kind, number), (before, name) in zip(steps, pairwise(path), strict=True):
            start, value = value, apply(kind, value, number)
            facts.append(fact(name, kind, number, before))
            told.append(f"{name}={start}{SIGNS[kind]}{number}={value}.")
            values[name] = value
        plan = [*facts[::-1], "So"]
        facts += [self._distractor(name, values, rng) for name in others]
        rng.shuffle(facts)
        problem = " ".join([*facts, f"{path[-1]}?"])
        return problem, " ".join([*plan, *told, f"Answer: {value}"]), value

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
            return f"{name}={values[name]}."
        kind = rng.choice(fitting)
        number = rng.randint(*ranges[kind])
        values[name] = apply(kind, values[before], number)
        return fact(name, kind, number, before)


def fact(name: str, kind: Operation, number: int, before: str) -> str:
    """The sentence that defines the quantity `name` by the quantity `before`."""
    return f"{name}={before}{SIGNS[kind]}{number}."
