"""Problems whose question shows other attempts, with the headings of a context. A model that reads contexts
is trained and evaluated on them.

No attempt comes from a model. A shown success is the worked solution. A shown failure is the worked solution
with one mistake and its consequences.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from reflux.config.step_context import seed_of
from reflux.contexts.wording import with_attempts
from reflux.tasks.arithmetic import SIGNS, Operation, apply
from reflux.tasks.base import Split, TaskPart
from reflux.tasks.word_problems import WordProblems
from reflux.types import Prompt, Reward, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.rollouts.environment import Environment

STEP = re.compile(r"[0-9]+([-+*])([0-9]+)=[0-9]+\.")
KINDS: dict[str, Operation] = {sign: kind for kind, sign in SIGNS.items()}
SLIPS = (1, -1, 2, -2, 10, -10, 20, -20)
# the shares of the failures that stop early, and that end in random characters
CUT, GARBLED = 0.1, 0.1


@dataclass(frozen=True)
class ShownProblem(TaskPart):
    """The stories of `task` with `successes` right and `failures` wrong attempts in the question. The answer
    is judged as without them.

    foreign: the attempts are at the next problem of the stream, so they give no information about the asked
    problem. A held-out split then has one problem less. The random numbers of a wrong attempt depend on the
    id of its problem alone.
    """

    task: WordProblems
    successes: int
    failures: int
    foreign: bool = False
    weight: float = 1.0

    @property
    def rollouts(self) -> type[Rollout]:
        return TokenRollout

    @property
    def routes(self) -> frozenset[str | None] | None:
        return None

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        stream = self.task.prompts(split, seed, start)
        if not self.foreign:
            return (self._ask(prompt, prompt) for prompt in stream)
        return (self._ask(prompt, other) for prompt, other in pairwise(stream))

    def verify(self, prompt: Prompt, made: Any) -> float | Reward:
        return self.task.verify(prompt, made)

    @property
    def multi_turn(self) -> bool:
        return self.task.multi_turn

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        return self.task.open_env(prompt, step)

    def _ask(self, prompt: Prompt, other: Prompt) -> Prompt:
        rng = random.Random(seed_of("shown", other.id))
        right = [other.references[0]] * self.successes
        wrong = [failed(other.references[0], rng) for _ in range(self.failures)]
        asked = with_attempts(prompt.messages[0]["content"], right, wrong)
        return replace(prompt, messages=({"role": "user", "content": asked},))


def failed(solution: str, rng: random.Random) -> str:
    """A wrong attempt made from a worked solution: one number is wrong, with all its consequences. A few
    attempts stop early or end in random characters.

    The wrong number is the start or the result of a step. It is replaced by a number nearby, or it loses a
    digit. The last number is never the right answer, because every step maps different numbers to different
    numbers. ValueError for a text that is not a worked solution.
    """
    start, steps = read(solution)
    while True:
        text = _worked(start, steps, rng.randrange(len(steps) + 1), rng)
        if text:
            break
    ending = rng.random()
    if ending < CUT:
        return text[: rng.randrange(len("Start: "), text.index("Answer:"))]
    if ending < CUT + GARBLED:
        body, _, tail = text.partition(" Answer:")
        return f"{body} {''.join(rng.sample(tail + ' Asr:', rng.randrange(2, 6)))}"
    return text


def read(solution: str) -> tuple[int, tuple[tuple[Operation, int], ...]]:
    """The chain of arithmetic steps in a worked solution. ValueError for another text."""
    head = re.match(r"Start: ([0-9]+)\.", solution)
    if head is None:
        raise ValueError(f"not a worked solution: {solution!r}")
    return int(head[1]), tuple((KINDS[sign], int(number)) for sign, number in STEP.findall(solution))


def _worked(start: int, steps: Sequence[tuple[Operation, int]], mistake: int, rng: random.Random) -> str:
    """The text with a wrong number at `mistake` (0: the start, k: the result of step k). "" if a value would
    be negative.
    """
    value = slip(start, rng) if mistake == 0 else start
    parts = [f"Start: {value}."]
    for position, (kind, number) in enumerate(steps, 1):
        after = apply(kind, value, number)
        if position == mistake:
            after = slip(after, rng)
        if after < 0:
            return ""
        parts.append(f"{value}{SIGNS[kind]}{number}={after}.")
        value = after
    return " ".join([*parts, f"Answer: {value}"])


def slip(number: int, rng: random.Random) -> int:
    """A wrong number that looks like a mistake: 1, 2, 10 or 20 away from `number`, or without one digit.
    Neither number is negative.
    """
    digits = str(number)
    if len(digits) > 1 and rng.random() < 0.3:
        lost = rng.randrange(len(digits))
        return int(digits[:lost] + digits[lost + 1 :])
    return rng.choice([number + off for off in SLIPS if number + off >= 0])
