"""The context protocol: a context defines the prompt that the teacher sees for each attempt.

`(group, step_context) -> one TeacherPrompt or None per attempt`. None: the teacher does not score this
attempt. The student's own tokens stay unchanged. A teacher prompt may change the messages before them, and
the replies between them, which the student did not choose.
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
    """`messages` stand before the first student token. `spans` hold the messages that the teacher sees in
    place of later replies of the environment, by the position at which such a reply starts in the attempt
    (`rollouts.replies`). The teacher's own chat template writes them.

    `notes` describe in numbers what the prompt shows. They are averaged into the metrics. A change of the
    notes alone does not make the teacher score again.
    """

    messages: tuple[Message, ...]
    spans: dict[int, tuple[Message, ...]] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)


def retold(messages: tuple[Message, ...], tell: Callable[[str], str]) -> tuple[Message, ...]:
    """The messages with the content of the last user message replaced by `tell(content)`; all others stay
    unchanged. ValueError if there is no user message.
    """
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError("a context that adds to the question needs a user message, and this prompt has none")
    return tuple(
        {**message, "content": tell(message["content"])} if place == last else message
        for place, message in enumerate(messages)
    )


class ContextPart(Part, Protocol):
    """Base class of contexts. It holds the defaults of optional members."""

    # False if the teacher sees no text besides the student's prompt.
    adds_words: ClassVar[bool] = True

    def most_added(self, longest: int, count: Callable[[str], int]) -> int:
        """The largest number of tokens by which a prompt grows if it shows other attempts. longest: the
        tokens of the longest attempt. count: gives the number of tokens of a text.
        """
        return 0


class Context(ContextPart, Protocol):
    # Attempts per prompt that the context needs.
    min_group: ClassVar[int]

    @property
    def requirements(self) -> Requirements: ...

    def __call__(self, group: Group, step_context: StepContext) -> list[TeacherPrompt | None]: ...
