"""Generates short stories with several arithmetic steps and their worked solutions: the built-in default
task.

"Tom has 12 apples. Buys 7. Loses 5. How many?"  ->  "Start: 12. 12+7=19. 19-5=14. Answer: 14"

A problem is defined by its chain of numbers and operations (`tasks.arithmetic`). The name, the things and
the verbs do not change it.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Sequence
from typing import ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.tasks.arithmetic import SIGNS, ArithmeticTask, Chain, Operation, apply

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
BEGINNING = re.compile(rf"(?:{'|'.join(NAMES)}) has ([0-9]+) (?:{'|'.join(THINGS)})\.$")
NUMBER = re.compile(r"(?<![0-9])[0-9]+(?![0-9])")


@dataclass(frozen=True, config=STRICT)
class WordProblems(ArithmeticTask):
    """Stories of several arithmetic steps with their worked solutions. No number is above `largest` or below
    0. `Prompt.route` is "mul" if at least half of the steps multiply, else "add", so teachers can be
    specialists. `Prompt.references` has the worked solution.
    """

    kind: ClassVar[str] = "word_problems"

    def tell(self, chain: Chain, rng: random.Random) -> tuple[str, str, int]:
        value, steps = chain
        story = [f"{rng.choice(NAMES)} has {value} {rng.choice(THINGS)}."]
        for kind, number in steps:
            value = apply(kind, value, number)
            story.append(rng.choice(WORDS[kind]).format(number))
        return " ".join([*story, "How many?"]), worked(chain), value

    def read(self, problem: str) -> tuple[Chain, str] | None:
        first, *sentences = re.split(r"(?<=\.) ", problem.strip())
        begun = BEGINNING.match(first)
        steps = [_step(sentence) for sentence in sentences[:-1]]
        if begun is None or not sentences or sentences[-1] != "How many?" or None in steps:
            return None
        chain: Chain = int(begun[1]), tuple(step for step in steps if step is not None)
        return chain, worked(chain)


def worked(chain: Chain) -> str:
    """The worked solution of a chain."""
    value, steps = chain
    solution = [f"Start: {value}."]
    for kind, number in steps:
        after = apply(kind, value, number)
        solution.append(f"{value}{SIGNS[kind]}{number}={after}.")
        value = after
    return " ".join([*solution, f"Answer: {value}"])


def _step(sentence: str) -> tuple[Operation, int] | None:
    """The operation that a sentence of a story tells."""
    told = NUMBER.sub("{}", sentence)
    found = NUMBER.search(sentence)
    for kind, words in WORDS.items():
        if found is not None and told in words:
            return kind, int(found[0])
    return None


def write_lines(arguments: Sequence[str]) -> None:
    """Print the first N problems of a split as JSON lines: `python -m reflux.tasks.word_problems SPLIT N
    [SEED]`.
    """
    split, count, seed = arguments[0], int(arguments[1]), int(arguments[2]) if len(arguments) > 2 else 0
    for prompt in itertools.islice(WordProblems(held_out=count).prompts(split, seed), count):  # pyright: ignore[reportArgumentType]
        line = {"id": prompt.id, "prompt": prompt.messages[0]["content"], "answer": prompt.answer}
        print(json.dumps(line))


if __name__ == "__main__":
    write_lines(sys.argv[1:])
