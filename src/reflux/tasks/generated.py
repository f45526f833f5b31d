"""What tasks share whose problems are drawn by a program and answered by a whole number."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import seed_of
from reflux.tasks.base import Split, TaskPart
from reflux.types import Prompt, Rollout, TokenRollout

# The largest number of draws for one problem of the wanted split. Each held-out split has a tenth of all.
TRIES = 20_000
ANSWER = re.compile(r"\s*(-?[0-9]+)(?![0-9]|[.,][0-9])")


@dataclass(frozen=True, config=STRICT)
class GeneratedTask(TaskPart):
    """The base class of tasks that draw their problems. Subclasses define `kind` and `draw_prompt`.

    Problem number p of a split depends on (split, seed, p) alone, so `prompts` reaches any `start` at once.
    """

    # The registered name, with which the random numbers of each problem are seeded.
    kind: ClassVar[str]

    # the number of problems in each of "validation" and "test"; "train" never ends
    held_out: Annotated[int, Field(ge=1)] = 500
    # the share of this task in a mix of tasks, relative to the weights of the others
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @property
    def ends(self) -> bool | None:
        return False

    @property
    def rollouts(self) -> type[Rollout]:
        return TokenRollout

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Problems from position `start` on. "train" never ends, the others have `held_out` problems."""
        position = start
        while split == "train" or position < self.held_out:
            yield self.draw_prompt(split, seed, position)
            position += 1

    @abstractmethod
    def draw_prompt(self, split: Split, seed: int, position: int) -> Prompt:
        """ValueError if the settings allow too few different problems."""

    def verify(self, prompt: Prompt, made: Any) -> float:
        """1.0 if the whole number after the last "Answer:" of `made` has exactly the digits of the answer,
        else 0.0. ValueError for a prompt without an answer, which is one of another task.
        """
        if prompt.answer is None:
            raise ValueError(
                f"prompt {prompt.id} has no answer to compare with; {self.kind} judges only its own prompts"
            )
        return float(last_answer(made) == prompt.answer)


def last_answer(made: Any) -> str | None:
    """The whole number after the last "Answer:" of a text; None without one, and for anything but a text."""
    if not isinstance(made, str) or "Answer:" not in made:
        return None
    found = ANSWER.match(made.rpartition("Answer:")[2])
    return None if found is None else found[1]


def split_of(problem: object) -> Split:
    """The split of a problem, the same for every seed: a tenth of all problems is "validation", a tenth
    "test", the rest "train". It depends on the repr of the problem.
    """
    tenth = seed_of(problem) % 10
    return "validation" if tenth == 0 else "test" if tenth == 1 else "train"
