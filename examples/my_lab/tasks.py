"""A custom task: `kind = "my_lab.tasks:Backwards"`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import seed_of
from reflux.tasks.base import Split, TaskPart
from reflux.types import Prompt, Rollout, TokenRollout


@dataclass(frozen=True, config=STRICT)
class Backwards(TaskPart):
    """The task is to write a word of `letters` random letters backwards. Each word is in one split only, for
    every seed.
    """

    letters: int = 6
    held_out: int = 200
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.letters < 3 or self.held_out < 1:
            raise ValueError("needs letters >= 3, so that there are enough words, and held_out >= 1")

    @property
    def rollouts(self) -> type[Rollout]:
        # the task grades texts
        return TokenRollout

    @property
    def routes(self) -> frozenset[str | None]:
        # prompts have no route, so any teacher can be asked
        return frozenset([None])

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompt number p depends only on (split, seed, p). Split "train" never ends."""
        position = start
        while split == "train" or position < self.held_out:
            rng = random.Random(seed_of("backwards", split, seed, position))
            word = self._word(rng)
            while _split_of(word) != split:
                word = self._word(rng)
            message = {"role": "user", "content": f"Write {word} backwards."}
            yield Prompt(f"{split}-{position}", (message,), answer=word[::-1], references=(word[::-1],))
            position += 1

    def verify(self, prompt: Prompt, made: Any) -> float:
        if prompt.answer is None:
            raise ValueError(f"prompt {prompt.id} has no answer to compare with")
        return float(made.split()[-1:] == [prompt.answer])

    def _word(self, rng: random.Random) -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=self.letters))


def _split_of(word: str) -> Split:
    tenth = seed_of("backwards", word) % 10
    return "validation" if tenth == 0 else "test" if tenth == 1 else "train"
