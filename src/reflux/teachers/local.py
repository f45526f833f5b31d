"""A teacher in this process: a transformers model that answers with hidden states."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.context import StudentSpec
from reflux.config.registry import STRICT, PartOf
from reflux.contexts.base import Context
from reflux.contexts.same import Same
from reflux.models.folders import look_for_text
from reflux.models.placement import Device, Dtype
from reflux.models.sizes import Size, size_of
from reflux.teachers.base import TeacherPart
from reflux.types import HiddenTarget, Rollout, Target, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


@dataclass(frozen=True, config=STRICT)
class Local(TeacherPart):
    """A frozen model with the student's token map. The model reads the student's exact tokens, and gives the
    full distribution as hidden states.

    A peft adapter is merged into its base model, so each teacher that is an adapter holds a whole model.

    routes: only prompts with one of these routes are scored. alias: the name that several tables with routes
    share.
    """

    rollouts: ClassVar[type[Rollout]] = TokenRollout
    in_process: ClassVar[bool] = True

    # A folder, a GGUF file, a hub id, an earlier run directory, `reflux:teacher`, or a peft adapter.
    model: str
    # The base model if `model` is an adapter; not set: the one that the adapter's config names.
    base_model: str | None = None
    context: Annotated[Context, PartOf("contexts")] = Same()
    alias: str | None = None
    routes: tuple[str, ...] = ()
    # Tokens in one forward pass, padding included.
    batch_tokens: Annotated[int, Field(ge=1)] = 32768
    # "auto": as stored, but float32 on a CPU that is slower in 16 bits; or float32, bfloat16 or float16
    # (short: fp32, bf16, fp16).
    dtype: Dtype = "auto"
    device: Device = "auto"
    # Placement by accelerate, for example "auto" to offload to the CPU.
    device_map: str | None = None
    # True: the weights, except the output head's, are on the CPU while the teacher is not scoring.
    offload: bool = False
    # The `attn_implementation` argument of transformers.
    attention: str | None = None
    trust_remote_code: bool = False
    # System prompt. Used only for contexts that change the messages.
    system: str | None = None
    # Chat-template arguments. Used only for contexts that change the messages.
    template: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.offload and self.device_map:
            raise ValueError("device_map already says where the weights are. Leave it or offload out")

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.offload and self.device == "cpu":
            yield f"{where}.offload has no effect, because the teacher's device is the CPU."

    def inputs(self, where: str) -> None:
        look_for_text(self.model, f"{where}.model", self.base_model)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.model,)

    def acts_with(self, opened: Any) -> Any:
        return StudentSpec(self.model, trust_remote_code=self.trust_remote_code, base_model=self.base_model)

    def reader(self, student: StudentSpec) -> StudentSpec | None:
        return StudentSpec(
            self.model,
            self.system,
            self.template,
            student.prompt_suffix,
            self.trust_remote_code,
            self.base_model,
        )

    def size(self, where: str, student: Size, pixels: int) -> Size | None:
        return size_of(self.model, f"{where}.model", pixels, self.base_model)

    @property
    def offers(self) -> tuple[type[Target], ...]:
        return (HiddenTarget,)

    @property
    def at_ids(self) -> bool:
        return True

    @property
    def follows(self) -> bool:
        return False

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.teachers.local_engine import LocalTeacher

        return LocalTeacher.opened(self, context, services)
