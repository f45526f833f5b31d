"""The default learner: a transformers model trained with AdamW in one process."""

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
from reflux.models.folders import look_for_text
from reflux.models.placement import Device
from reflux.models.settings import Decay, Lora, Positive
from reflux.types import Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.models.text_shape import TextShape
    from reflux.runtime.services import Services


LORA = Paper(
    "lora",
    "LoRA: Low-Rank Adaptation of Large Language Models",
    "2106.09685",
    2021,
    "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and others",
)


@dataclass(frozen=True, config=STRICT)
class HF(LearnerPart):
    """AdamW on float32 master weights, with bfloat16 autocast on a GPU. Micro-batches are cut by a token
    budget.

    Adam scales a gradient of any size up to a full step, even if the gradient is only rounding error. A
    student that equals its teacher would therefore drift away from it. `min_grad_norm` prevents this.

    `prompt_suffix` is added to the end of every prompt, after the text with which the chat template opens the
    student's turn. The student's response begins after the suffix. Every teacher that scores the student's
    tokens gets the same suffix, also under a context that changes the messages. It is meant for a base
    student whose teacher thinks: "<think>\\n" opens the thinking for both (arXiv 2602.15260). If the rendered
    template already ends with the suffix, it is not added again. Evaluations use the suffix too. ModelError
    if the suffix has characters for which the tokenizer has no token.
    """

    rollouts: ClassVar[type[Rollout]] = TokenRollout

    # The model that training starts from, or a peft adapter, which is merged into its base model.
    model: str
    # The base model if `model` is an adapter; not set: the one that the adapter's config names.
    base_model: str | None = None
    # System prompt, put before conversations that have none.
    system: str | None = None
    # Chat-template arguments, for example enable_thinking = false.
    template: dict[str, Any] = Field(default_factory=dict)
    # Text at the end of every prompt, for the student and its teachers, for example "<think>\n".
    prompt_suffix: str | None = None
    lr: Number = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # The gradient is clipped to this norm.
    clip: Positive = 1.0
    # A gradient norm of at most this value counts as rounding error, and no optimiser step is made.
    min_grad_norm: Annotated[float, Field(ge=0)] = 1e-6
    # Tokens in one micro-batch: prompts and responses, padding included. "auto": 16,384 on a CPU; on a GPU
    # found from measured memory, up to where more are not faster. The gradient does not depend on it.
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    # True: torch.compile of each layer. The first steps take minutes more; it needs a C++ compiler.
    compile: bool = False
    # "auto": bfloat16 on a GPU.
    autocast: Literal["auto", "off"] = "auto"
    device: Device = "auto"
    # The `attn_implementation` argument of transformers.
    attention: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        number(self.lr, "lr")

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return negative_rate(f"{where}.lr", self.lr, cfg.steps)

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return () if self.lora is None else (LORA,)

    @property
    def student(self) -> StudentSpec:
        return StudentSpec(
            self.model,
            self.system,
            self.template,
            self.prompt_suffix,
            self.trust_remote_code,
            self.base_model,
        )

    def inputs(self, where: str) -> None:
        look_for_text(self.model, f"{where}.model", self.base_model, trained=True)

    @property
    def trains_all(self) -> bool:
        return self.lora is None

    def activation_bytes(self, shape: TextShape, gpu: bool, tokens: int) -> int:
        from reflux.models.token_budget import FIXED, busy_tokens

        found = busy_tokens(shape.width) if gpu else FIXED
        most = found if self.micro_batch_tokens == "auto" else self.micro_batch_tokens
        narrow = gpu and self.autocast == "auto"
        return min(most, tokens) * shape.activation_bytes(narrow, self.gradient_checkpointing)

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.learners.hf_engine import HFLearner

        return HFLearner.opened(self, context, services)
