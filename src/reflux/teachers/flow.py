"""A flow model as teacher. Its target is its velocity at the states that the student visited."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT, PartOf
from reflux.contexts.base import Context
from reflux.contexts.same import Same
from reflux.models.flow.adapter_folders import adapter_file, on_hub
from reflux.models.folders import look_for_flow
from reflux.models.placement import Device, Dtype
from reflux.models.sizes import Size, size_of
from reflux.teachers.base import TeacherPart, TeacherScorer
from reflux.types import FlowRollout, Rollout, Target, VelocityTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


@dataclass(frozen=True, config=STRICT)
class Flow(TeacherPart):
    """A frozen flow model, whole or as an adapter on one (arXiv 2605.08063). It gives v_TD at every counted
    state of an attempt.

    Tables with the same model, dtype and device share one copy of the model, each with its own adapter. A
    table without an adapter uses the base model, for example as the reference of an anchor. The states of all
    these tables go through the model in common calls, in which each row has its own adapter. The velocity
    uses the guidance that the attempt was sampled with.

    A model is refused before anything is sampled if its grid of times, its states or its prompts differ from
    the student's. An adapter is refused if it lacks keys or changes no velocity; in the released code both
    silently become the base model. routes: only prompts with one of these routes are scored. alias: the name
    that several tables with routes share.
    """

    rollouts: ClassVar[type[Rollout]] = FlowRollout
    in_process: ClassVar[bool] = True
    shares_weights: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    # The base model: a folder or a hub id.
    model: str
    # Folder or hub id of LoRA factors on the model, in the format of peft or diffusers.
    adapter: str | None = None
    context: Annotated[Context, PartOf("contexts")] = Same()
    alias: str | None = None
    routes: tuple[str, ...] = ()
    # None: the student's guidance. Any other value must equal the student's.
    guidance: Annotated[float, Field(allow_inf_nan=False)] | None = None
    # States in one call; the smallest value counts for tables that share a model. Guidance doubles the rows.
    batch_positions: Annotated[int, Field(ge=1)] = 64
    # "auto": as stored on a GPU, float32 on a CPU.
    dtype: Dtype = "auto"
    device: Device = "auto"

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        of_student = cfg.sampler.generation
        if self.guidance is not None and of_student.grids and self.guidance != of_student.guidance:
            yield (
                f"{where}.guidance is {self.guidance:g}, but the student is sampled with guidance "
                f"{of_student.guidance:g}: student and teachers must use the same guidance, in sampling and "
                "in the loss. Leave it out, or set both to the same value."
            )

    def inputs(self, where: str) -> None:
        look_for_flow(self.model, f"{where}.model", "local")
        if self.adapter is not None and not on_hub(self.adapter):
            adapter_file(self.adapter, f"{where}.adapter")

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.model,) if self.adapter is None else (self.model, self.adapter)

    def acts_with(self, opened: Any) -> Any:
        return opened.model

    def scorer(self, opened: Any) -> TeacherScorer:
        return opened.scorer

    def size(self, where: str, student: Size, pixels: int) -> Size | None:
        return size_of(self.model, f"{where}.model", pixels)

    @property
    def offers(self) -> tuple[type[Target], ...]:
        return (VelocityTarget,)

    @property
    def at_ids(self) -> bool:
        return False

    @property
    def follows(self) -> bool:
        return False

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.teachers.flow_engine import FlowTeacher

        return FlowTeacher.opened(self, context, services)
