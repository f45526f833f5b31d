"""The prompts of another task, with the answers of a teacher that can only be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT, PartOf
from reflux.engines.endpoints.base import Endpoint
from reflux.engines.endpoints.teacher_answers import TeacherSampling
from reflux.errors import DataError
from reflux.tasks.answer_index import StoredAnswers, digest
from reflux.tasks.base import Solution, Split, Task, TaskPart
from reflux.types import Message, Prompt, Reward, Rollout

if TYPE_CHECKING:
    from reflux.rollouts.environment import Environment


@dataclass(frozen=True, config=STRICT)
class Answered(TaskPart):
    """The task `of`, with a teacher's answers as the `references` of its training prompts. `reflux answers
    RECIPE` asks the teacher once and writes them to the file `path`; a run only reads them.

    The reward `rubric`, the sampler `references` and the context `privileged` use the same file. A file that
    another teacher, or the same with other settings, has filled is refused, and so is a prompt without a
    line. Prompts of other splits, and the verdicts, are those of the task `of`.
    """

    # the task whose prompts are answered
    of: Annotated[Task, PartOf("tasks")]
    # who answers
    teacher: Annotated[Endpoint, PartOf("endpoints")]
    # the index file
    path: str
    # the number of answers to each prompt
    answers: Annotated[int, Field(ge=1)] = 4
    # of the answers
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    # of an answer; a cut one is not accepted
    max_tokens: Annotated[int, Field(ge=1)] = 8192
    # seconds of one try
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
    # the share of this task in a `mix`
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @property
    def paths(self) -> tuple[str, ...]:
        return ("path",)

    @property
    def stored_answers(self) -> StoredAnswers:
        sampling = TeacherSampling(self.answers, self.temperature, self.max_tokens, self.timeout_s)
        return StoredAnswers(Path(self.path).expanduser(), self.of, self.teacher, sampling)

    def inputs(self, where: str) -> None:
        self._index()

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        """The prompts of the task `of`; those of "train" with the stored answers. DataError for a prompt
        without a line, or whose messages have changed.
        """
        stream = self.of.prompts(split, seed, start)
        if split != "train":
            return stream
        index = self._index()
        return (self._answered(prompt, index.get(prompt.id)) for prompt in stream)

    def _index(self) -> dict[str, Any]:
        stored = self.stored_answers
        if not stored.path.is_file():
            raise DataError(
                f"task.path: there is no file {stored.path} with answers of the teacher. Fill it with "
                "`reflux answers` and the same recipe."
            )
        return dict(stored.read())

    def _answered(self, prompt: Prompt, row: dict[str, Any] | None) -> Prompt:
        if row is None or row["prompt_sha256"] != digest(prompt):
            what = "has no line" if row is None else "has a line for other messages"
            raise DataError(
                f"prompt {prompt.id} {what} in {self.path}. Fill the file with `reflux answers` and the same "
                "recipe."
            )
        return replace(prompt, references=tuple(row["answers"][: self.answers]))

    # --- what the task `of` says

    @property
    def judges(self) -> bool:
        return self.of.judges

    @property
    def local(self) -> bool:
        return self.of.local

    @property
    def ends(self) -> bool | None:
        return self.of.ends

    @property
    def patience(self) -> int:
        return self.of.patience

    @property
    def multi_turn(self) -> bool:
        return self.of.multi_turn

    @property
    def judge(self) -> str | None:
        return self.of.judge

    @property
    def routes(self) -> frozenset[str | None] | None:
        return self.of.routes

    @property
    def rollouts(self) -> type[Rollout]:
        return self.of.rollouts

    @property
    def solves(self) -> bool:
        return self.of.solves

    def solve(self, problem: str) -> Solution | None:
        return self.of.solve(problem)

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        return self.of.open_env(prompt, step)

    def runs_once(self, prompt: Prompt) -> bool:
        return self.of.runs_once(prompt)

    @property
    def replays(self) -> bool:
        return self.of.replays

    def replay(self, prompt: Prompt, turns: Sequence[Message], step: int) -> list[tuple[Message, ...]]:
        return self.of.replay(prompt, turns, step)

    def evidence(self, rollout: Rollout) -> Any:
        return self.of.evidence(rollout)

    def part_of(self, prompt: Prompt) -> str | None:
        return self.of.part_of(prompt)

    def verify(self, prompt: Prompt, made: Any) -> float | Reward:
        return self.of.verify(prompt, made)
