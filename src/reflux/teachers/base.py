"""The teacher protocol: a teacher gives a target for each position of an attempt.

`open(context, services)` returns an object that answers requests and does not write to its inputs.
`collection.Teachers` stores the answers on the attempts. Several tables may share one name by `alias` and
`routes`; each prompt then goes to exactly one of them.
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
    """One attempt to score: the rollout, the prompt that the teacher sees, and what the answer must contain
    besides the target.
    """

    rollout: Rollout
    view: TeacherPrompt
    # The teacher handles the fields `logp` and `candidates`.
    requirements: Requirements


class OpenTeacher(Protocol):
    # Multiply-accumulates per position, for FLOP accounting.
    macs: int

    async def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
        """One answer per request, in order. An answer without a target gives the reason in `error`. An
        exception is raised for faults that concern all requests, such as broken weights. Equal requests get
        equal answers, and requests are not changed.
        """
        ...

    async def publish(self, weights: Weights, step: int) -> None:
        """Take new student weights. A no-op unless this teacher follows the student."""
        ...

    def save(self, folder: Path) -> None:
        """Write the state that cannot be loaded again from its model into an empty folder."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        ...


class TeacherPart(Part, Protocol):
    """Base class of teachers. It holds the defaults of optional members."""

    # True if the teacher is the student itself, at the current step or at an earlier one.
    is_student: ClassVar[bool] = False
    # True if tables with the same model hold its weights only once.
    shares_weights: ClassVar[bool] = False
    # True if its model can sample images for the sampler `teacher_samples`.
    draws: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the models and adapters that it is loaded from. Empty for a teacher outside this
        process.
        """
        return ()

    def acts_with(self, opened: Any) -> Any:
        """The model that `Sampler.open_with` takes to sample from this teacher; None if it has no model in
        this process. opened: this teacher, open.
        """
        return None

    def reader(self, student: StudentSpec) -> StudentSpec | None:
        """The text model that reads the teacher's prompt, and how the prompt is rendered. None for teachers
        of images and teachers outside this process.
        """
        return None

    def size(self, where: str, student: Size, pixels: int) -> Size | None:
        """The size of its model, from file headers alone. None if it holds no model in this process. pixels:
        the side of its images.
        """
        return None


class Teacher(TeacherPart, Protocol):
    # The type of rollouts it can score.
    rollouts: ClassVar[type[Rollout]]
    # The types of targets it gives.
    offers: ClassVar[tuple[type[Target], ...]]
    # True if batched calls are the fast ones.
    in_process: ClassVar[bool]
    # True if it can give its log-probs at any token ids that the student lists.
    at_ids: ClassVar[bool]

    @property
    def follows(self) -> bool:
        """True if its weights change with the student's."""
        ...

    @property
    def context(self) -> Context: ...

    @property
    def routes(self) -> tuple[str, ...]: ...

    @property
    def alias(self) -> str | None:
        """The name that objectives and credit rules use for it; None: the name of its table."""
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenTeacher]: ...


def alias_of(table: str, teacher: Teacher) -> str:
    """The name that objectives and credit rules use for this table."""
    return teacher.alias or table
