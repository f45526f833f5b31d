"""The teacher protocol: a teacher gives a target for each position of an attempt.

`open(context, services)` returns an object that answers requests and does not write to its inputs.
`collection.Teachers` stores the answers on the attempts. Several `[teachers.NAME]` tables of the recipe may
share one name by `alias` and `routes`; each prompt then goes to exactly one of these tables.
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


def plain_requests(rollouts: Sequence[Rollout]) -> list[TeacherRequest]:
    """Requests in which the teacher sees the student's own prompt, and nothing but the target is required."""
    return [TeacherRequest(r, TeacherPrompt(r.prompt.messages), Requirements()) for r in rollouts]


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


class TeacherScorer(Protocol):
    """Scores for several open teachers by common model calls. The requests of teachers with equal scorers are
    given together.
    """

    async def score(self, asked: Sequence[tuple[Any, Sequence[TeacherRequest]]]) -> list[list[TeacherAnswer]]:
        """For each (teacher, requests) what `score` of this teacher answers, up to rounding."""
        ...


class TeacherPart(Part, Protocol):
    """Base class of teachers. It holds the defaults of optional members."""

    # True if the teacher is the student itself, at the current step or at an earlier one.
    is_student: ClassVar[bool] = False
    # True if teacher tables with the same model share one copy of its weights.
    shares_weights: ClassVar[bool] = False
    # True if the teacher's model can sample images for the sampler `teacher_samples`.
    draws: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the models and adapters that the teacher is loaded from. Empty for a teacher outside
        this process.
        """
        return ()

    def acts_with(self, opened: Any) -> Any:
        """The model that `Sampler.open_with` takes to sample from this teacher, for texts as a StudentSpec;
        None if the teacher has no model in this process. opened: what `open` of this teacher gave.
        """
        return None

    def scorer(self, opened: Any) -> TeacherScorer | None:
        """What scores for this teacher and for others that share its model; None: its own `score`. opened:
        what `open` of this teacher gave.
        """
        return None

    def reader(self, student: StudentSpec) -> StudentSpec | None:
        """The text model that reads the teacher's prompt, and how the prompt is rendered. None for teachers
        of images. student: the student's model and how its prompts are rendered.
        """
        return None

    def size(self, where: str, student: Size, pixels: int) -> Size | None:
        """The size of the teacher's model, from file headers alone. None if the teacher holds no model in
        this process. where: the path of the teacher's table in the recipe, for errors. student: the size of
        the student. pixels: the side of the images.
        """
        return None


class Teacher(TeacherPart, Protocol):
    # The type of rollouts that the teacher can score.
    rollouts: ClassVar[type[Rollout]]
    # True if the model runs in this process, so that one batched call is faster than several calls.
    in_process: ClassVar[bool]

    @property
    def offers(self) -> tuple[type[Target], ...]:
        """The types of targets that the teacher gives."""
        ...

    @property
    def at_ids(self) -> bool:
        """True if the teacher can give its log-probs at any token ids that the student lists."""
        ...

    @property
    def follows(self) -> bool:
        """True if the teacher's weights change with the student's."""
        ...

    @property
    def context(self) -> Context: ...

    @property
    def routes(self) -> tuple[str, ...]: ...

    @property
    def alias(self) -> str | None:
        """The name that objectives and credit rules use for the teacher. None: they use the recipe key, which
        is NAME in `[teachers.NAME]`.
        """
        ...

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenTeacher]: ...


def alias_of(table: str, teacher: Teacher) -> str:
    """The name that objectives and credit rules use for the teacher. table: the NAME of its table."""
    return teacher.alias or table
