"""Little stories with several arithmetic steps and the worked solution, made on the spot: the embedded
default.

"Tom has 12 apples. Buys 7. Loses 5. How many?"  ->  "Start: 12. 12+7=19. 19-5=14. Answer: 14"

A problem is its chain of numbers and operations; the name, the thing and the verbs are dressing. A hash of
the chain alone puts every problem in exactly one split, whatever the seed, so a chain held out never occurs
in training, not even in another dress.
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
# the start, then (operation, number) step by step
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
# draws until a problem of the right split turns up; a tenth of all chains is in each held-out split
TRIES = 20_000
ANSWER = re.compile(r"\s*(-?[0-9]+)(?![0-9]|[.,][0-9])")


@dataclass(frozen=True, config=STRICT)
class WordProblems(TaskPart):
    """Stories of `min_steps` to `max_steps` operations in which no number exceeds `largest` and none is
    negative.

    operations: what may happen in a story. `Prompt.route` is "mul" where at least half of the steps multiply,
    else "add", so that teachers can specialise. longer: with k > 0 the held-out stories have exactly
    max_steps + k steps, more than any training story; training is unchanged. held_out: how many problems
    "validation" and "test" hold each; "train" never ends.

    Problem number p of a split depends on (split, seed, p) alone, so `start` costs nothing.
    `Prompt.references` holds the worked solution. ValueError where the settings leave no story, or no
    held-out one.
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
            raise ValueError("needs 1 <= min_steps <= max_steps")
        if self.longer < 0 or self.held_out < 0 or not self.weight > 0:
            raise ValueError("longer and held_out must not be negative, and weight must be above 0")
        most = self.max_steps + self.longer
        # sub before add or mul: what falls may rise again
        falling_first: list[Operation] = sorted(self.operations, reverse=True)
        orders: list[list[Operation]] = [falling_first, *([kind] for kind in self.operations)]
        if not any(_ranges(tuple(order * most)[:most], self.largest) for order in orders):
            raise ValueError(
                f"no story of {most} steps stays within largest = {self.largest}; raise largest, or allow "
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
        """Problems from position `start` on; "train" for ever, the others `held_out` of them."""
        position = start
        while split == "train" or position < self.held_out:
            yield self._prompt(split, seed, position)
            position += 1

    def verify(self, prompt: Prompt, made: Any) -> float:
        """1.0 where the whole number after the last "Answer:" is the answer digit for digit, else 0.0."""
        if prompt.answer is None:
            raise ValueError(
                f"prompt {prompt.id} has no answer to compare with; word_problems must grade its own prompts"
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
                f"word_problems: too few different stories to hold some out for '{split}'; raise largest or "
                "max_steps"
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
        """One draw; None where these operations in this order cannot stay within the range."""
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
    """The split a chain belongs to, for every seed: a tenth is "validation", a tenth "test", the rest
    "train".
    """
    tenth = seed_of(chain) % 10
    return "validation" if tenth == 0 else "test" if tenth == 1 else "train"


def tell(chain: Chain, rng: random.Random) -> tuple[str, str, int]:
    """(story, worked solution, answer) of a chain, dressed by the random numbers."""
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
    """Per state of the story, first to last, the least and greatest value from which the rest can be told; []
    if there is none.
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
    # a story starts with 2 things or more
    fits = all(low <= high for low, high in ranges) and ranges[0][1] >= 2
    return ranges if fits else []


def _numbers(kind: Operation, value: int, low: int, high: int) -> tuple[int, int]:
    """The least and the greatest number that takes `value` into [low, high]."""
    if kind == "add":
        return max(1, low - value), high - value
    if kind == "sub":
        return max(1, value - high), value - low
    return max(2, -(-low // value)), min(LARGEST_FACTOR, high // value)


if __name__ == "__main__":
    write_lines(sys.argv[1:])
