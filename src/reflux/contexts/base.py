"""A context: what the teacher sees that the student did not.

`(group, moment) -> one View or None per attempt`. None: do not ask the teacher about this attempt. The
student's own tokens stay as they are; a view may change the messages before them, and the text of spans that
the student did not choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from reflux.config.part import Part
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.types import Group, Message


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """The messages before the first student token, and new text for the unchosen spans after it, by their
    start position.

    `notes` say in numbers what is shown; they are averaged into the metrics, and a teacher is not asked again
    because they change.
    """

    messages: tuple[Message, ...]
    spans: dict[int, str] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)


def retold(messages: tuple[Message, ...], tell: Callable[[str], str]) -> tuple[Message, ...]:
    """The messages with what the user said last told anew; all others stay as they are. ValueError where no
    user speaks.
    """
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError("a context that adds to the question needs a user message, and this prompt has none")
    return tuple(
        {**message, "content": tell(message["content"])} if place == last else message
        for place, message in enumerate(messages)
    )


class ContextPart(Part, Protocol):
    """What a context inherits: the defaults of what it may leave unsaid."""

    # False where the teacher is told no word more than the student was
    adds_words: ClassVar[bool] = True

    def most_added(self, longest: int, count: Callable[[str], int]) -> int:
        """Tokens that showing other attempts adds to a prompt at most: `longest` tokens an attempt, `count`
        of a text's tokens.
        """
        return 0


class Context(ContextPart, Protocol):
    # attempts per prompt it needs
    min_group: ClassVar[int]

    @property
    def requirements(self) -> Requirements: ...

    def __call__(self, group: Group, step_context: StepContext) -> list[TeacherPrompt | None]: ...
