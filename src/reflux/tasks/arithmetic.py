"""What the tasks `word_problems` and `chains` share: chains of arithmetic steps with whole numbers.

A problem is defined by its chain of numbers and operations; its words do not change it. A hash of the chain
alone puts a problem in exactly one split, for every seed. So a held-out chain never occurs in training, also
not with other words.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import Literal

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import seed_of
from reflux.tasks.base import Solution, Split
from reflux.tasks.generated import TRIES, GeneratedTask, split_of
from reflux.types import Prompt

Operation = Literal["add", "sub", "mul"]
# the start value, then (operation, number) for each step
Chain = tuple[int, tuple[tuple[Operation, int], ...]]

SIGNS: dict[Operation, str] = {"add": "+", "sub": "-", "mul": "*"}
LARGEST_FACTOR = 9


@dataclass(frozen=True, config=STRICT)
class ArithmeticTask(GeneratedTask):
    """The base class of tasks whose problems are chains of arithmetic steps. Subclasses define `kind` and
    `tell`.

    `Prompt.route` is "mul" if at least half of the steps multiply, else "add", so teachers can be
    specialists. `Prompt.references` has the worked solution. ValueError if the settings allow no problem, or
    no held-out one.
    """

    # the operations that a problem may use
    operations: tuple[Operation, ...] = ("add", "sub")
    # the smallest number of operations of a problem
    min_steps: int = 2
    # the largest number of operations of a training problem
    max_steps: int = 3
    # the largest number that a problem or its solution may contain; none is below 0
    largest: int = 50
    # k > 0: held-out problems have exactly max_steps + k operations; training is unchanged
    longer: int = 0

    def __post_init__(self) -> None:
        if not self.operations or len(set(self.operations)) != len(self.operations):
            raise ValueError("operations must name at least one of add, sub, mul, each once")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"{self.kind} needs 1 <= min_steps <= max_steps")
        if self.longer < 0:
            raise ValueError("longer must not be negative")
        if not self._possible():
            raise ValueError(
                f"no problem of {self.most_steps} steps stays within largest = {self.largest}. Raise "
                "largest, or allow other operations"
            )

    @property
    def most_steps(self) -> int:
        return self.max_steps + self.longer

    @property
    def judge(self) -> str | None:
        return "reflux.evals.prompt_difficulty:as_word_problem"

    @property
    def routes(self) -> frozenset[str | None]:
        multiplies = "mul" in self.operations
        return frozenset(
            (["mul"] if multiplies else []) + (["add"] if not multiplies or len(self.operations) > 1 else [])
        )

    def numbers(self, kind: Operation, value: int, low: int, high: int) -> tuple[int, int]:
        """The least and the greatest number with which the operation on `value` gives a result in
        [low, high]. The least is above the greatest if there is none. To multiply, `value` must be above 0.
        """
        if kind == "add":
            return max(1, low - value), high - value
        if kind == "sub":
            return max(1, value - high), value - low
        return max(2, -(-low // value)), min(LARGEST_FACTOR, high // value)

    @property
    def solves(self) -> bool:
        return True

    def solve(self, problem: str) -> Solution | None:
        found = self.read(problem)
        if found is None:
            return None
        (value, steps), worked = found
        for kind, number in steps:
            value = apply(kind, value, number)
        return Solution(worked, str(value), tuple((SIGNS[kind], number) for kind, number in steps))

    @abstractmethod
    def read(self, problem: str) -> tuple[Chain, str] | None:
        """(chain, worked solution) of a problem that `tell` has told; None for any other text."""

    @abstractmethod
    def tell(self, chain: Chain, rng: random.Random) -> tuple[str, str, int]:
        """(problem, worked solution, answer) of a chain. rng: chooses the words."""

    def draw_prompt(self, split: Split, seed: int, position: int) -> Prompt:
        rng = random.Random(seed_of(self.kind, split, seed, position))
        for _ in range(TRIES):
            chain = self._chain(rng, split)
            if chain is not None and split_of(chain) == split:
                break
        else:
            raise ValueError(
                f"{self.kind}: there are too few different problems for the split '{split}'. Raise largest "
                "or max_steps"
            )
        problem, solution, answer = self.tell(chain, rng)
        muls = sum(kind == "mul" for kind, _ in chain[1])
        return Prompt(
            id=f"{split}-{position}-{seed_of(problem) & 0xFFFFFFFF:08x}",
            messages=({"role": "user", "content": problem},),
            answer=str(answer),
            references=(solution,),
            route="mul" if 2 * muls >= len(chain[1]) else "add",
        )

    def _chain(self, rng: random.Random, split: Split) -> Chain | None:
        """One random chain. None if these operations in this order cannot stay within the range."""
        longer = self.longer and split != "train"
        steps = self.most_steps if longer else rng.randint(self.min_steps, self.max_steps)
        kinds: tuple[Operation, ...] = tuple(rng.choice(self.operations) for _ in range(steps))
        ranges = _ranges(kinds, self.largest)
        if not ranges:
            return None
        value = first = rng.randint(max(2, ranges[0][0]), ranges[0][1])
        chosen: list[tuple[Operation, int]] = []
        for kind, (low, high) in zip(kinds, ranges[1:], strict=True):
            least, most = self.numbers(kind, value, low, high)
            if least > most:
                return None
            chosen.append((kind, rng.randint(least, most)))
            value = apply(kind, value, chosen[-1][1])
        return first, tuple(chosen)

    def _possible(self) -> bool:
        # First all sub, then add or mul, because a value that has fallen can rise again.
        falling_first: list[Operation] = sorted(self.operations, reverse=True)
        orders: list[list[Operation]] = [falling_first, *([kind] for kind in self.operations)]
        most = self.most_steps
        return any(_ranges(tuple(order * most)[:most], self.largest) for order in orders)


def apply(kind: Operation, value: int, number: int) -> int:
    return value + number if kind == "add" else value - number if kind == "sub" else value * number


def _ranges(kinds: tuple[Operation, ...], largest: int) -> list[tuple[int, int]]:
    """For each value of the chain, first to last, the least and the greatest from which the remaining
    operations stay in range. [] if there is no such value.
    """
    low, high = 0, largest
    ranges = [(low, high)]
    for kind in reversed(kinds):
        if kind == "add":
            low, high = 0, high - 1
        elif kind == "sub":
            low, high = low + 1, largest
        else:
            low, high = max(1, -(-low // LARGEST_FACTOR)), high // 2
        ranges.append((low, high))
    ranges.reverse()
    # A chain starts with at least 2.
    fits = all(low <= high for low, high in ranges) and ranges[0][1] >= 2
    return ranges if fits else []
