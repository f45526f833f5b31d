"""The teacher sees exactly the student's prompt."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.base import ContextPart, TeacherPrompt
from reflux.types import Group


@dataclass(frozen=True, config=STRICT)
class Same(ContextPart):
    """The student's own prompt without additions (plain on-policy distillation)."""

    min_group: ClassVar[int] = 1
    adds_words: ClassVar[bool] = False

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, group: Group, step_context: StepContext) -> list[TeacherPrompt | None]:
        return [TeacherPrompt(attempt.rollout.prompt.messages) for attempt in group]
