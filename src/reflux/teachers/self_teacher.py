"""The student itself as the teacher: as it is, as it was at one step, or as a slow average of its path."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, PartOf
from reflux.contexts.base import Context
from reflux.contexts.same import Same
from reflux.teachers.base import TeacherPart
from reflux.types import HiddenTarget, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext, StudentSpec
    from reflux.config.recipe import RunConfig
    from reflux.models.sizes import Size
    from reflux.runtime.services import Services

MEAN_TEACHER = Paper(
    "mean_teacher",
    "Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep "
    "learning results",
    "1703.01780",
    2017,
    "Tarvainen, Antti and Valpola, Harri",
)


@dataclass(frozen=True, config=STRICT)
class SelfTeacher(TeacherPart):
    """A float32 copy phi of the student's weights theta that answers with hidden states. It teaches through
    what its context adds.

    follow ema: phi <- (1 - `ema`) phi + `ema` theta after each optimiser step that moved theta, by its
    gradient or by a jump, from the starting student on; 1 keeps phi at theta and 0 at the start, to the bit.
    A step that moved nothing (refused, or without any evidence) leaves phi alone. live: phi is theta. frozen:
    phi is theta up to optimiser step `step` and stays as it was then; 0 is the starting student. phi is in
    every checkpoint (not under live, where the student's own weights say it).

    Its model is the learner's; adapters come merged. Where a context changes the messages they are rendered
    as the sampler's, its `system` and `template`. A teacher that moves needs max_staleness = 0: its head
    would have moved before the attempt is used. Under context `same`, live and 1 cost 0 everywhere, as do all
    of them before the first step. An average of the path as teacher: arXiv 1703.01780.
    """

    rollouts: ClassVar[type[Rollout]] = TokenRollout
    offers: ClassVar[tuple[type, ...]] = (HiddenTarget,)
    in_process: ClassVar[bool] = True
    at_ids: ClassVar[bool] = True
    is_student: ClassVar[bool] = True

    follow: Literal["ema", "live", "frozen"] = "ema"
    # the student's share in each move, under ema
    ema: Annotated[float, Field(ge=0, le=1)] = 0.05
    # of frozen: the optimiser step after which it stays
    step: Annotated[int, Field(ge=0)] = 0
    context: Annotated[Context, PartOf("contexts")] = Same()
    alias: str | None = None
    routes: tuple[str, ...] = ()
    # padding included, per forward pass
    batch_tokens: Annotated[int, Field(ge=1)] = 32768
    # auto: bfloat16 passes on a GPU, as the learner's
    autocast: Literal["auto", "off"] = "auto"
    device: str = "auto"
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.step and self.follow != "frozen":
            raise ValueError(
                f'step = {self.step} says when a frozen copy is taken, and follow is "{self.follow}". Use '
                'follow = "frozen"'
            )

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (MEAN_TEACHER,) if self.follow == "ema" else ()

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.follows and not self.context.adds_words:
            yield f"{where} follows the student and is shown nothing more: where the student begins, nothing ever moves. Give it a context."

    def reader(self, student: StudentSpec) -> StudentSpec | None:
        return student

    def size(self, where: str, student: Size, pixels: int) -> Size | None:
        """The student's weights once more, in float32."""
        return replace(student, stored_bytes=None if student.parameters is None else student.parameters * 4)

    @property
    def follows(self) -> bool:
        return self.follow != "frozen" or self.step > 0

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.teachers.self_teacher_engine import SelfTeacherEngine

        return SelfTeacherEngine.opened(self, context, services)
