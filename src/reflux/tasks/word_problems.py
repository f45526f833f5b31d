"""Generates short stories with several arithmetic steps and their worked solutions: the built-in default
task.

"Tom has 12 apples. Buys 7. Loses 5. How many?"  ->  "Start: 12. 12+7=19. 19-5=14. Answer: 14"

A problem is defined by its chain of numbers and operations. The name, the things and the verbs do not change
it. A hash of the chain alone puts every problem in exactly one split, for every seed. So a held-out chain
never occurs in training, also not with other words.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import seed_of
from reflux.tasks.base import Split, TaskPart
from reflux.types import Prompt, Rollout, TokenRollout

Operation = Literal["add", "sub", "mul"]
# the start value, then (operation, number) for each step
Chain = tuple[int, tuple[tuple[Operation, int], ...]]

NAMES = (
    "Tom",
    "Ann",
    "Ben",
    "Eva",
    "Max",
    "Mia",
    "Sam",
    "Lea",
    "Jim",
    "Zoe",
    "Dan",
    "Kim",
    "Leo",
    "Ida",
    "Pia",
    "Ron",
)
THINGS = (
    "apples",
    "books",
    "coins",
    "cards",
    "pens",
    "eggs",
    "nuts",
    "keys",
    "stamps",
    "shells",
    "beans",
    "stones",
)
WORDS: dict[Operation, tuple[str, ...]] = {
    "add": ("Buys {}.", "Finds {}.", "Gets {}.", "Wins {}."),
    "sub": ("Loses {}.", "Sells {}.", "Drops {}.", "Gives {}."),
    "mul": ("Grows {} fold.", "Now {} times.", "Makes {} lots."),
}
SIGNS: dict[Operation, str] = {"add": "+", "sub": "-", "mul": "*"}
LARGEST_FACTOR = 9
# The largest number of draws for one problem of the wanted split. Each held-out split has a tenth of all
# chains.
TRIES = 20_000
ANSWER = re.compile(r"\s*(-?[0-9]+)(?![0-9]|[.,][0-9])")


@dataclass(frozen=True, config=STRICT)
class WordProblems(TaskPart):
    """Stories of `min_steps` to `max_steps` operations, with no number above `largest` or below 0.

    operations: the operations that a story may use. `Prompt.route` is "mul" if at least half of the steps
    multiply, else "add", so teachers can be specialists. longer: with k > 0 the held-out stories have exactly
    max_steps + k steps, more than any training story. Training is unchanged. held_out: the number of problems
    in each of "validation" and "test". "train" never ends.

    Problem number p of a split depends on (split, seed, p) alone, so `prompts` reaches any `start` at once.
    `Prompt.references` has the worked solution. ValueError if the settings allow no story, or no held-out
    story.
    """

    operations: tuple[Operation, ...] = ("add", "sub")
    min_steps: int = 2
    max_steps: int = 3
    largest: int = 50
    longer: int = 0
    held_out: int = 500
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.operations or len(set(self.operations)) != len(self.operations):
            raise ValueError("operations must name at least one of add, sub, mul, each once")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError("word_problems needs 1 <= min_steps <= max_steps")
        if self.longer < 0 or self.held_out < 0 or not self.weight > 0:
            raise ValueError("longer and held_out must not be negative, and weight must be above 0")
        most = self.max_steps + self.longer
        # First all sub, then add or mul, because a value that has fallen can rise again.
        falling_first: list[Operation] = sorted(self.operations, reverse=True)
        orders: list[list[Operation]] = [falling_first, *([kind] for kind in self.operations)]
        if not any(_ranges(tuple(order * most)[:most], self.largest) for order in orders):
            raise ValueError(
                f"no story of {most} steps stays within largest = {self.largest}. Raise largest, or allow "
                "other operations"
            )

    @property
    def ends(self) -> bool | None:
        return False

    @property
    def judge(self) -> str | None:
        return "reflux.evals.prompt_difficulty:as_word_problem"

    @property
    def rollouts(self) -> type[Rollout]:
        return TokenRollout

    @property
    def routes(self) -> frozenset[str | None]:
        multiplies = "mul" in self.operations
        return frozenset(
            (["mul"] if multiplies else []) + (["add"] if not multiplies or len(self.operations) > 1 else [])
        )

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Problems from position `start` on. "train" never ends, the others have `held_out` problems."""
        position = start
        while split == "train" or position < self.held_out:
            yield self._prompt(split, seed, position)
            position += 1

    def verify(self, prompt: Prompt, made: Any) -> float:
        """1.0 if the whole number after the last "Answer:" of `made` has exactly the digits of the answer,
        else 0.0.
        """
        if prompt.answer is None:
            raise ValueError(
                f"prompt {prompt.id} has no answer to compare with; word_problems judges only its own prompts"
            )
        if not isinstance(made, str) or "Answer:" not in made:
            return 0.0
        found = ANSWER.match(made.rpartition("Answer:")[2])
        return float(found is not None and found[1] == prompt.answer)

    def _prompt(self, split: Split, seed: int, position: int) -> Prompt:
        rng = random.Random(seed_of("word_problems", split, seed, position))
        for _ in range(TRIES):
            chain = self._chain(rng, split)
            if chain is not None and split_of(chain) == split:
                break
        else:
            raise ValueError(
                f"word_problems: there are too few different stories for the split '{split}'. Raise largest "
                "or max_steps"
            )
        story, solution, answer = tell(chain, rng)
        muls = sum(kind == "mul" for kind, _ in chain[1])
        return Prompt(
            id=f"{split}-{position}-{seed_of(story) & 0xFFFFFFFF:08x}",
            messages=({"role": "user", "content": story},),
            answer=str(answer),
            references=(solution,),
            route="mul" if 2 * muls >= len(chain[1]) else "add",
        )

    def _chain(self, rng: random.Random, split: Split) -> Chain | None:
        """One random chain. None if these operations in this order cannot stay within the range."""
        longer = self.longer and split != "train"
        steps = self.max_steps + self.longer if longer else rng.randint(self.min_steps, self.max_steps)
        kinds: tuple[Operation, ...] = tuple(rng.choice(self.operations) for _ in range(steps))
        ranges = _ranges(kinds, self.largest)
        if not ranges:
            return None
        value = first = rng.randint(max(2, ranges[0][0]), ranges[0][1])
        story: list[tuple[Operation, int]] = []
        for kind, (low, high) in zip(kinds, ranges[1:], strict=True):
            least, most = _numbers(kind, value, low, high)
            if least > most:
                return None
            story.append((kind, rng.randint(least, most)))
            value = apply(kind, value, story[-1][1])
        return first, tuple(story)


def write_lines(arguments: Sequence[str]) -> None:
    """Print the first N problems of a split as JSON lines: `python -m reflux.tasks.word_problems SPLIT N
    [SEED]`.
    """
    split, count, seed = arguments[0], int(arguments[1]), int(arguments[2]) if len(arguments) > 2 else 0
    for prompt in itertools.islice(WordProblems(held_out=count).prompts(split, seed), count):  # pyright: ignore[reportArgumentType]
        line = {"id": prompt.id, "prompt": prompt.messages[0]["content"], "answer": prompt.answer}
        print(json.dumps(line))


def apply(kind: Operation, value: int, number: int) -> int:
    return value + number if kind == "add" else value - number if kind == "sub" else value * number


def split_of(chain: Chain) -> Split:
    """The split of a chain of arithmetic steps, the same for every seed: a tenth of all chains is
    "validation", a tenth "test", the rest "train".
    """
    tenth = seed_of(chain) % 10
    return "validation" if tenth == 0 else "test" if tenth == 1 else "train"


def tell(chain: Chain, rng: random.Random) -> tuple[str, str, int]:
    """(story, worked solution, answer) of a chain of arithmetic steps. rng: chooses the words."""
    value, steps = chain
    story = [f"{rng.choice(NAMES)} has {value} {rng.choice(THINGS)}."]
    solution = [f"Start: {value}."]
    for kind, number in steps:
        after = apply(kind, value, number)
        story.append(rng.choice(WORDS[kind]).format(number))
        solution.append(f"{value}{SIGNS[kind]}{number}={after}.")
        value = after
    return " ".join([*story, "How many?"]), " ".join([*solution, f"Answer: {value}"]), value


def _ranges(kinds: tuple[Operation, ...], largest: int) -> list[tuple[int, int]]:
    """For each state of the story, first to last, the least and greatest value from which the remaining
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
    # A story starts with at least 2 things.
    fits = all(low <= high for low, high in ranges) and ranges[0][1] >= 2
    return ranges if fits else []


def _numbers(kind: Operation, value: int, low: int, high: int) -> tuple[int, int]:
    """The least and the greatest number with which the operation on `value` gives a result in [low, high]."""
    if kind == "add":
        return max(1, low - value), high - value
    if kind == "sub":
        return max(1, value - high), value - low
    return max(2, -(-low // value)), min(LARGEST_FACTOR, high // value)


if __name__ == "__main__":
    write_lines(sys.argv[1:])
