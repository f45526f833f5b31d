"""The student itself as the teacher: the current student, the student at one step, or a slow average of its
weights.
"""

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
from reflux.models.placement import Device
from reflux.teachers.base import TeacherPart
from reflux.types import HiddenTarget, Rollout, Target, TokenRollout

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
    """A float32 copy phi of the student's weights theta that answers with hidden states. Its training signal
    comes from the text that its context adds to the prompt.

    follow "ema": phi <- (1 - `ema`) phi + `ema` theta after each optimiser step that changed theta, by its
    gradient or by an extrapolation jump, starting from the initial student. `ema` = 1 keeps phi equal to
    theta, and `ema` = 0 keeps phi at the initial student, both bit for bit. A step that changed nothing
    (refused, or without any evidence) leaves phi unchanged. "live": phi is theta. "frozen": phi is theta up
    to optimiser step `step` and does not change afterwards; 0 is the initial student. phi is in every
    checkpoint, except under "live", where the student's own weights contain it.

    The teacher's model is the learner's, with adapters merged. If a context changes the messages, they are
    rendered with the student's `system` and `template`, as for the sampler. A teacher that changes needs
    max_staleness = 0, because the teacher's output head (the matrix that maps hidden states to logits) would
    otherwise change before the attempt is used. Under context `same`, the divergence is 0 everywhere for
    "live" and for `ema` = 1, and before the first step for every setting. An average of the weights as
    teacher: arXiv 1703.01780.
    """

    rollouts: ClassVar[type[Rollout]] = TokenRollout
    in_process: ClassVar[bool] = True
    is_student: ClassVar[bool] = True

    # Which student weights the teacher uses.
    follow: Literal["ema", "live", "frozen"] = "ema"
    # Under "ema": the student's share in each update.
    ema: Annotated[float, Field(ge=0, le=1)] = 0.05
    # Under "frozen": the optimiser step after which the weights stay fixed.
    step: Annotated[int, Field(ge=0)] = 0
    context: Annotated[Context, PartOf("contexts")] = Same()
    alias: str | None = None
    routes: tuple[str, ...] = ()
    # Tokens in one forward pass, padding included.
    batch_tokens: Annotated[int, Field(ge=1)] = 32768
    # "auto": bfloat16 passes on a GPU, as in the learner.
    autocast: Literal["auto", "off"] = "auto"
    device: Device = "auto"
    # The `attn_implementation` argument of transformers.
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.step and self.follow != "frozen":
            raise ValueError(
                f'step = {self.step} sets when a frozen copy is taken, but follow is "{self.follow}". Use '
                'follow = "frozen"'
            )

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (MEAN_TEACHER,) if self.follow == "ema" else ()

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.follows and not self.context.adds_words:
            yield (
                f"{where} follows the student and sees the same prompt: it equals the student at the start, "
                "so no weight ever changes. Give it a context."
            )

    def reader(self, student: StudentSpec) -> StudentSpec | None:
        return student

    def size(self, where: str, student: Size, pixels: int) -> Size | None:
        """The size of the student's weights, in float32."""
        return replace(student, stored_bytes=None if student.parameters is None else student.parameters * 4)

    @property
    def offers(self) -> tuple[type[Target], ...]:
        return (HiddenTarget,)

    @property
    def at_ids(self) -> bool:
        return True

    @property
    def follows(self) -> bool:
        return self.follow != "frozen" or self.step > 0

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.teachers.self_teacher_engine import SelfTeacherEngine

        return SelfTeacherEngine.opened(self, context, services)
