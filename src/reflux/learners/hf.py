"""The default learner: a transformers model, AdamW, one process."""

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
from reflux.models.settings import Decay, Lora, Positive
from reflux.types import Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
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
    """AdamW on float32 master weights, bfloat16 autocast on GPU, micro-batches cut by a token budget.

    Adam scales a gradient of any size up to a full step, rounding included: a student that has become its
    teacher would wander off. Hence `min_grad_norm`.

    `prompt_suffix` ends every prompt after what the chat template writes to open the student's turn; the
    student begins behind it, and so does every teacher that is asked about its tokens, also under a context
    that changes the messages. It is for a base student whose teacher thinks: "<think>\\n" opens the thinking
    for both (arXiv 2602.15260). A template that ends with it already is left as it is. Evaluations use it
    too. ModelError for a text that the tokenizer has no token for.
    """

    rollouts: ClassVar[type[Rollout]] = TokenRollout

    model: str
    # a system prompt, put before conversations that have none
    system: str | None = None
    # chat-template arguments, for example enable_thinking = false
    template: dict[str, Any] = Field(default_factory=dict)
    # a text that ends every prompt, for the student and its teachers, such as "<think>\n"
    prompt_suffix: str | None = None
    lr: Number = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # gradient norm
    clip: Positive = 1.0
    # a gradient norm up to this is rounding, and no step is made
    min_grad_norm: Annotated[float, Field(ge=0)] = 1e-6
    # prompt and response, padding included
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 16384
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    # auto: bfloat16 on a GPU
    autocast: Literal["auto", "off"] = "auto"
    device: str = "auto"
    # transformers' attn_implementation
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
        return StudentSpec(self.model, self.system, self.template, self.prompt_suffix, self.trust_remote_code)

    def inputs(self, where: str) -> None:
        look_for_text(self.model, f"{where}.model")

    @property
    def trains_all(self) -> bool:
        return self.lora is None

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.learners.hf_engine import HFLearner

        return HFLearner.opened(self, context, services)
