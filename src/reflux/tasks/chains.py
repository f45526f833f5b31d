"""Generates problems whose worked answer is long and begins with a plan: which quantities lead from the one
that is asked for to the one that is given. "Kb3-" says that K is b, and 3 less; "A7" says that A is 7.

"Mk4+. Kb3-. A7. Ba5+. C2. K?"  ->
"Kb3-. Ba5+. A7. So A=7. Ba5+=7+5=12. Kb3-=12-3=9. Answer: 9"

A wrong quantity in the plan makes every later sentence compute something that was not asked for.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise
from string import ascii_uppercase as LETTERS
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.tasks.arithmetic import SIGNS, ArithmeticTask, Chain, Operation, apply
from reflux.tasks.base import Split

# A number that is added, subtracted or multiplied by has one digit.
LARGEST_NUMBER = 9
FACT = re.compile(r"([A-Z])(?:([0-9]+)|([a-z])([0-9]+)([+*-]))\.$")


@dataclass(frozen=True, config=STRICT)
class Chains(ArithmeticTask):
    """Quantities that are defined by one another, in random order. `min_steps` to `max_steps` operations lead
    from the one that is given to the one that is asked for, and no number is above `largest` or below 0.

    A capital letter names the quantity that a sentence defines, a small one the quantity that it starts from.
    Each quantity starts at most one other, so the plan has one right form.

    `Prompt.references` has the worked solution: first the plan, which repeats the sentences that lead from
    the quantity that is asked for to the given one, then every value in the opposite order. With the default
    settings it has 160 to 270 characters. `Prompt.route` is that of the task `word_problems`.
    """

    kind: ClassVar[str] = "chains"

    min_steps: int = 8
    max_steps: int = 12
    largest: int = 30
    # the largest value of a quantity that is defined by its value
    largest_given: Annotated[int, Field(ge=2)] = 9
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
        for kind, number in steps:
            value = apply(kind, value, number)
        facts = [f"{fact}." for fact in definitions(path, chain)]
        facts += self._distractors(others, {path[-1]: value}, rng)
        rng.shuffle(facts)
        return " ".join([*facts, f"{path[-1]}?"]), self.worked(path, chain), value

    def worked(self, path: list[str], chain: Chain) -> str:
        """The worked solution. path: the names of the quantities, from the given one to that which is asked
        for.
        """
        value, steps = chain
        first, *later = definitions(path, chain)
        told = [f"{path[0]}={value}."]
        for fact, (kind, number) in zip(later, steps, strict=True):
            start, value = value, apply(kind, value, number)
            told.append(f"{fact}={start}{SIGNS[kind]}{number}={value}.")
        plan = [f"{fact}." for fact in (*later[::-1], first)]
        return " ".join([*plan, "So", *told, f"Answer: {value}"])

    def read(self, problem: str) -> tuple[Chain, str] | None:
        *facts, question = problem.split() or [""]
        found = [FACT.match(fact) for fact in facts]
        told = {fact[1]: fact for fact in found if fact is not None}
        name = question.removesuffix("?")
        path: list[str] = []
        while name in told and name not in path:
            path.insert(0, name)
            name = (told[name][3] or "").upper()
        if not path or name or len(told) != len(facts) or not question.endswith("?"):
            return None
        signs: dict[str, Operation] = {sign: kind for kind, sign in SIGNS.items()}
        chain: Chain = (
            int(told[path[0]][2]),
            tuple((signs[told[name][5]], int(told[name][4])) for name in path[1:]),
        )
        return chain, self.worked(path, chain)

    def numbers(self, kind: Operation, value: int, low: int, high: int) -> tuple[int, int]:
        least, most = super().numbers(kind, value, low, high)
        return least, min(most, LARGEST_NUMBER)

    def _chain(self, rng: random.Random, split: Split) -> Chain | None:
        chain = super()._chain(rng, split)
        return chain if chain is not None and chain[0] <= self.largest_given else None

    def _distractors(self, names: list[str], last: dict[str, int], rng: random.Random) -> list[str]:
        """A sentence that defines each of `names`, by a number or by a quantity that starts no other one.
        last: the values of the quantities that start no other one. It is changed.
        """
        facts = []
        for name in names:
            before = rng.choice([None, *last])
            fitting = [] if before is None else self._fitting(last[before])
            if before is None or not fitting:
                last[name] = rng.randint(2, min(self.largest_given, self.largest))
                facts.append(f"{name}{last[name]}.")
            else:
                kind, least, most = rng.choice(fitting)
                number = rng.randint(least, most)
                last[name] = apply(kind, last.pop(before), number)
                facts.append(f"{defined(name, kind, number, before)}.")
        return facts

    def _fitting(self, value: int) -> list[tuple[Operation, int, int]]:
        """Each operation that `value` allows, with the least and the greatest number for it."""
        ranges: list[tuple[Operation, int, int]] = [
            (kind, *self.numbers(kind, value, 0, self.largest))
            for kind in self.operations
            if value or kind != "mul"
        ]
        return [(kind, least, most) for kind, least, most in ranges if least <= most]


def definitions(path: list[str], chain: Chain) -> list[str]:
    """What defines each quantity of a path: the first by its value, every other one by the one before it."""
    value, steps = chain
    return [
        f"{path[0]}{value}",
        *(
            defined(name, kind, number, before)
            for (kind, number), (before, name) in zip(steps, pairwise(path), strict=True)
        ),
    ]


def defined(name: str, kind: Operation, number: int, before: str) -> str:
    """The definition of the quantity `name` by the quantity `before`."""
    return f"{name}{before.lower()}{number}{SIGNS[kind]}"
