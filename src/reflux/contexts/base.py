"""A context: what the teacher sees that the student did not.

`(group, moment) -> one View or None per attempt`. None: do not ask the teacher about this attempt. The student's own tokens stay as
they are; a view may change the messages before them, and the text of spans that the student did not choose.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from reflux.types import Group, Message, Moment, Wants


@dataclass(frozen=True, slots=True)
class View:
    """The messages before the first student token, and new text for the unchosen spans after it, by their start position."""

    messages: tuple[Message, ...]
    spans: dict[int, str] = field(default_factory=dict)


class Context(Protocol):
    min_group: int

    @property
    def wants(self) -> Wants: ...

    def __call__(self, group: Group, moment: Moment) -> list[View | None]: ...
