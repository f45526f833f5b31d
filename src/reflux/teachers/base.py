"""A teacher: how should the student have acted, position by position?

`open(context, services)` gives an object that answers requests and writes to none of what it is given.
`collection.Teachers` puts the answers on the attempts. Several tables may share one name by `as` and
`routes`; each prompt then asks exactly one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from reflux.config.part import Part
from reflux.config.requirements import Requirements
from reflux.contexts.base import Context, TeacherPrompt
from reflux.types import Rollout, Target, TeacherAnswer

if TYPE_CHECKING:
    from reflux.config.context import PartContext, StudentSpec
    from reflux.models.sizes import Size
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """One attempt that a teacher is asked about: what the student did, what the teacher is to see, and what
    else it has to give.
    """

    rollout: Rollout
    view: TeacherPrompt
    # `logp` and `candidates` are the teacher's
    requirements: Requirements


class OpenTeacher(Protocol):
    # multiply-accumulates per position, for FLOP accounting
    macs: int

    async def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
        """One answer per request, in order. An answer without a target says in `error` why there is none;
        what no request can be answered with, such as broken weights, raises. The same request twice gives
        equal answers, and no request changes."""
        ...

    async def publish(self, weights: Weights, step: int) -> None:
        """A no-op unless this teacher follows the student."""
        ...

    def save(self, folder: Path) -> None:
        """What does not come from its model again, into an empty folder."""
        ...

    def load(self, folder: Path) -> None:
        """Take up what `save` put there."""
        ...


class TeacherPart(Part, Protocol):
    """What a teacher inherits: the defaults of what it may leave unsaid."""

    # True where it is the student itself, now or at some time before
    is_student: ClassVar[bool] = False
    # True where tables of one model hold its weights once
    shares_weights: ClassVar[bool] = False
    # True where its model can draw what it is asked about, as the sampler `teacher_samples` has it do
    draws: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[str, ...]:
        """The models and adapters it is loaded from, by their names; of a teacher elsewhere, none."""
        return ()

    def acts_with(self, opened: Any) -> Any:
        """What `Sampler.open_with` takes to have this teacher act itself; None where it has no model here.
        opened: this teacher, open.
        """
        return None

    def reader(self, student: StudentSpec) -> StudentSpec | None:
        """The model of texts that reads what is shown to it, and how it is spoken to; None: of images, or
        elsewhere.
        """
        return None

    def size(self, where: str, student: Size, pixels: int) -> Size | None:
        """How large its model is, from file headers alone; None where it holds none in this process. pixels:
        a side of its images.
        """
        return None


class Teacher(TeacherPart, Protocol):
    # what it can be asked about
    rollouts: ClassVar[type[Rollout]]
    offers: ClassVar[tuple[type[Target], ...]]
    # True where batched calls are the fast ones
    in_process: ClassVar[bool]
    # True where it can give its log-probs at any ids the student lists
    at_ids: ClassVar[bool]

    @property
    def follows(self) -> bool:
        """True where it moves with the student."""
        ...

    @property
    def context(self) -> Context: ...

    @property
    def routes(self) -> tuple[str, ...]: ...

    @property
    def alias(self) -> str | None:
        """The name it answers under; None: its table's."""
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenTeacher]: ...


def alias_of(table: str, teacher: Teacher) -> str:
    """The name objectives and credit rules know this table by."""
    return teacher.alias or table
