"""A task: where prompts come from, and how an answer is judged.

A task is a frozen value. `prompts` streams for ever (or raises StopIteration when a split is finite and passes are over); the same
(split, seed, start) always gives the same prompts, so a run resumes by position alone. `verify` is pure, imports no torch, and runs in a
worker process that is killed when it takes too long: it may be called on anything a model can write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from reflux.types import Message, Prompt, Reward, Rollout

Split = Literal["train", "validation", "test"]


class Task(Protocol):
    @property
    def weight(self) -> float:
        """Its share where several tasks are mixed."""
        ...

    @property
    def routes(self) -> frozenset[str | None] | None:
        """The routes its prompts may carry (None in it: some have none); None: not known before they are read."""
        ...

    @property
    def rollouts(self) -> type[Rollout]:
        """What it can judge: texts (TokenRollout) or pictures (FlowRollout)."""
        ...

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts from position `start` on. "train" never ends (a new order each epoch, the same ids); the others end."""
        ...

    def verify(self, prompt: Prompt, made: Any) -> float | Reward:
        """1.0 right, 0.0 wrong, or between; a Reward where there are parts to tell besides, such as {"quality": 0.9}.

        `made` is the text or the picture (uint8) that the student made. Raises ValueError without an answer.
        """
        ...

    def reply(self, prompt: Prompt, messages: Sequence[Message], step: int) -> tuple[Message, ...] | None:
        """What tools or a user say after the student's turn; None: the attempt is finished."""
        ...
