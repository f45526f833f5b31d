"""The protocol of tasks. A task gives prompts and judges answers.

A task is a frozen value. `prompts` is an endless stream, or a finite one for a split that ends. The same
(split, seed, start) always gives the same prompts, so a run can resume from the position alone. `verify` is
pure and imports no torch. It may be called with anything that a model can write, and it runs in a worker
process that is killed when it takes too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from reflux.config.part import Part
from reflux.types import Message, Prompt, Reward, Rollout

if TYPE_CHECKING:
    from reflux.rollouts.environment import Environment
    from reflux.tasks.answer_index import StoredAnswers

Split = Literal["train", "validation", "test"]
# The default of `patience`: two blocks of a mix.
PATIENCE = 2000
# The remedy in messages about a task that judges nothing.
JUDGED = 'Use a grader that judges, such as task.grader = "my_module:function"'


class Solution(NamedTuple):
    """The solution of one problem by the task's own rules."""

    worked: str
    answer: str
    # the operations that the solution needs, each with the number that it applies
    steps: tuple[tuple[str, int], ...]


class TaskPart(Part, Protocol):
    """The base class of tasks, with the defaults of optional members."""

    # True if the task mixes the prompts of other tasks
    mixes: ClassVar[bool] = False

    @property
    def judges(self) -> bool:
        """False if `verify` never gives a verdict."""
        return True

    @property
    def local(self) -> bool:
        """False if the prompts of this task may have to be downloaded. Then `reflux plan` reads no prompt."""
        return True

    @property
    def ends(self) -> bool | None:
        """True if the training prompts repeat, False if they are always new, None if this is not known."""
        return None

    @property
    def patience(self) -> int:
        """A pass over the training prompts has ended after so many prompts in a row that occurred before."""
        return 1 if self.ends else PATIENCE

    @property
    def multi_turn(self) -> bool:
        """True if `open_env` opens an environment for at least some prompts of this task."""
        return False

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        """Opens the environment that answers the student's turns in one attempt. None if the prompt is
        answered in one turn. step: the number of optimiser steps that were completed when the attempt began;
        in an evaluation, when the evaluation began. An environment that changes during a run keeps the state
        of this step until it is closed.
        """
        return None

    def runs_once(self, prompt: Prompt) -> bool:
        """True if the attempts at this prompt must not begin a second time, because what their environments
        do cannot be done twice. Attempts that had begun when a run was killed are then given up.
        """
        return False

    @property
    def replays(self) -> bool:
        """True if `replay` knows the replies of every environment that this task opens."""
        return False

    def replay(self, prompt: Prompt, turns: Sequence[Message], step: int) -> list[tuple[Message, ...]]:
        """The messages with which an environment opened at `step` replies to each of these turns of one
        attempt, one entry for each. It is pure and fast: it waits for nothing. The context `replay` calls it
        if `replays` is True.
        """
        return []

    def evidence(self, rollout: Rollout) -> Any:
        """What `verify` judges of an attempt, its argument `made`: the text or image that the student made. A
        task whose verdict depends on the replies returns the whole conversation, `rollout.messages`.
        """
        return rollout.made

    @property
    def judge(self) -> str | None:
        """The grader with which the task `jsonl` judges these prompts as this task does. None if there is no
        such grader. A subclass with another verifier must override it."""
        return None

    @property
    def solves(self) -> bool:
        """True if `solve` solves the problems of this task."""
        return False

    def solve(self, problem: str) -> Solution | None:
        """The solution of a problem, from its text alone. None if the text is no problem of this task."""
        return None

    @property
    def stored_answers(self) -> StoredAnswers | None:
        """The file with a teacher's answers to the training prompts; None if the task reads none."""
        return None

    def part_of(self, prompt: Prompt) -> str | None:
        """The name, in a mix, of the task that the prompt comes from. None if this task is not a mix."""
        return None


class Task(TaskPart, Protocol):
    @property
    def weight(self) -> float:
        """The share of this task in a mix of tasks, relative to the weights of the others."""
        ...

    @property
    def routes(self) -> frozenset[str | None] | None:
        """The routes that prompts of this task may have. None in the set: some prompts have no route. None
        instead of the set: the routes are not known before the prompts are read.
        """
        ...

    @property
    def rollouts(self) -> type[Rollout]:
        """The class of rollouts that this task can judge: TokenRollout (texts) or FlowRollout (images)."""
        ...

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts of a split from position `start` on. "train" never ends (a new order in each epoch, with
        the same ids). The other splits end. seed: determines the order.
        """
        ...

    def verify(self, prompt: Prompt, made: Any) -> float | Reward:
        """1.0 for right, 0.0 for wrong, or a number between. A Reward can have parts too, such as {"quality":
        0.9}.

        `made` is the text or the image (uint8) of the student, or what `evidence` returned. Raises ValueError
        if the prompt has no answer.
        """
        ...
