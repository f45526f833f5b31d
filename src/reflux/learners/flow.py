"""The learner for flow models: AdamW on all weights or on adapters, in one process."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.context import StudentSpec
from reflux.config.papers import Paper
from reflux.config.registry import STRICT
from reflux.config.schedules import Number, number
from reflux.learners.base import LearnerPart, negative_rate
from reflux.learners.hf import LORA
from reflux.models.flow.adapter_folders import adapter_file, adapter_folder, on_hub
from reflux.models.folders import look_for_flow
from reflux.models.placement import Device
from reflux.models.settings import Average, Decay, FlowLora, Merge, Positive
from reflux.types import FlowRollout, Rollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


RECTIFIED_FLOW = Paper(
    "rectified_flow",
    "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
    "2403.03206",
    2024,
    'Esser, Patrick and Kulal, Sumith and Blattmann, Andreas and Entezari, Rahim and M{\\"u}ller, Jonas and '
    "others",
)


@dataclass(frozen=True, config=STRICT)
class Flow(LearnerPart):
    """AdamW on the float32 master weights of a diffusers transformer, with bfloat16 autocast on a GPU. Each
    attempt is trained with the guidance that was used to sample it.

    Each position with a non-zero weight costs one forward pass of the network at the state stored in the
    rollout. No gradient flows through the sampler.
    """

    rollouts: ClassVar[type[Rollout]] = FlowRollout

    # The model that training starts from.
    model: str
    lr: Number = 3e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    # The gradient is clipped to this norm. Gradients of a KL in nats are large.
    clip: Positive = 1.0
    # A gradient norm of at most this value counts as rounding error, and no optimiser step is made.
    min_grad_norm: Annotated[float, Field(ge=0)] = 1e-3
    # Positions in one forward pass.
    micro_batch: Annotated[int, Field(ge=1)] = 64
    # A folder or hub id of LoRA adapters that training starts from. With the table `lora` the adapters are
    # trained further; without that table they are merged into the weights.
    adapter: str | None = None
    merge: Merge | None = None
    lora: FlowLora | None = None
    average: Average | None = None
    gradient_checkpointing: bool = False
    # "auto": bfloat16 on a GPU.
    autocast: Literal["auto", "off"] = "auto"
    device: Device = "auto"

    def __post_init__(self) -> None:
        number(self.lr, "lr")
        if self.adapter is not None and self.merge is not None:
            raise ValueError("adapter and merge both set the starting weights; keep one of them")

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return negative_rate(f"{where}.lr", self.lr, cfg.steps)

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (RECTIFIED_FLOW,) if self.lora is None else (LORA, RECTIFIED_FLOW)

    @property
    def student(self) -> StudentSpec:
        return StudentSpec(self.model)

    def inputs(self, where: str) -> None:
        look_for_flow(self.model, f"{where}.model", "hf")
        if self.adapter is not None and not on_hub(self.adapter):
            adapter_file(self.adapter, f"{where}.adapter")
        for index, name in enumerate(self.merge.models if self.merge else ()):
            place = f"{where}.merge.models[{index}]"
            if on_hub(name) or adapter_folder(name, place) is None:
                look_for_flow(name, place, "hf")

    @property
    def trains_all(self) -> bool:
        return self.lora is None

    @property
    def averages(self) -> bool:
        return self.average is not None

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.learners.flow_engine import FlowLearner

        return FlowLearner.opened(self, context, services)
