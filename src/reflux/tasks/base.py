"""A task: where prompts come from, and how an answer is judged.

A task is a frozen value. `prompts` streams for ever (or raises StopIteration when a split is finite and
passes are over); the same (split, seed, start) always gives the same prompts, so a run resumes by position
alone. `verify` is pure, imports no torch, and runs in a worker process that is killed when it takes too long:
it may be called on anything a model can write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from reflux.config.part import Part
from reflux.types import Prompt, Reward, Rollout

if TYPE_CHECKING:
    from reflux.rollouts.environment import Environment

Split = Literal["train", "validation", "test"]
# two blocks of a mix
PATIENCE = 2000
# a remedy where nothing is judged
JUDGED = 'Name one that judges, such as task.grader = "my_module:function"'


class TaskPart(Part, Protocol):
    """What a task inherits: the defaults of what it may leave unsaid."""

    # True where it asks other tasks by turns
    mixes: ClassVar[bool] = False

    @property
    def judges(self) -> bool:
        """False where `verify` never has a verdict."""
        return True

    @property
    def local(self) -> bool:
        """False where its prompts may have to be downloaded: a plan then does not ask for one."""
        return True

    @property
    def ends(self) -> bool | None:
        """True where its training prompts come again, False where there are always new ones; None: not known."""
        return None

    @property
    def patience(self) -> int:
        """So many training prompts in a row that were there before, and a pass over them is over."""
        return 1 if self.ends else PATIENCE

    @property
    def multi_turn(self) -> bool:
        """True where `open_env` opens environments, for some of its prompts at least."""
        return False

    def open_env(self, prompt: Prompt) -> Environment | None:
        """Opens what answers the student's turns in one attempt; None where the prompt is answered in one
        turn.
        """
        return None

    @property
    def judge(self) -> str | None:
        """The grader with which the task `jsonl` judges these prompts as this task does; None: it has none. A
        subclass that judges otherwise says so here."""
        return None

    def part_of(self, prompt: Prompt) -> str | None:
        """The name of the mixed task that the prompt came from; None where none is mixed."""
        return None


class Task(TaskPart, Protocol):
    @property
    def weight(self) -> float:
        """Its share where several tasks are mixed."""
        ...

    @property
    def routes(self) -> frozenset[str | None] | None:
        """The routes its prompts may carry (None in it: some have none); None: not known before they are
        read.
        """
        ...

    @property
    def rollouts(self) -> type[Rollout]:
        """What it can judge: texts (TokenRollout) or images (FlowRollout)."""
        ...

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts from position `start` on. "train" never ends (a new order each epoch, the same ids); the
        others end.
        """
        ...

    def verify(self, prompt: Prompt, made: Any) -> float | Reward:
        """1.0 right, 0.0 wrong, or between; a Reward where there are parts to tell besides, such as {"quality": 0.9}.

        `made` is the text or the image (uint8) that the student made. Raises ValueError without an answer.
        """
        ...
