"""Common base of the samplers that sample texts with the student."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from reflux.config.context import Generation
from reflux.config.registry import STRICT
from reflux.config.schedules import Number, at, number
from reflux.config.step_context import SamplingParams
from reflux.models.placement import Dtype
from reflux.samplers.base import SamplerPart
from reflux.types import Rollout, TokenRollout


def one_number(value: Any) -> Any:
    """The validator of `max_tokens`. ValueError for a schedule."""
    if isinstance(value, dict):
        raise ValueError(
            "max_tokens is one whole number, for evaluations too. Give the schedule to train_max_tokens, "
            "which caps training"
        )
    return value


@dataclass(frozen=True, config=STRICT)
class TextSampler(SamplerPart):
    """The fields that every such sampler has, and the members that follow from them."""

    rollouts: ClassVar[type[Rollout]] = TokenRollout
    on_policy: ClassVar[bool] = True

    # Limit of the student's tokens over all turns of an attempt.
    max_tokens: Annotated[int, Field(ge=1), BeforeValidator(one_number)] = 512
    # The same limit for training attempts; not set: max_tokens.
    train_max_tokens: Number | None = None
    # Temperature of training attempts.
    temperature: Annotated[float, Field(gt=0)] = 1.0
    # Tokens outside the smallest set with this probability are left out.
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Texts that end a response, besides the model's end tokens.
    stop: tuple[str, ...] = ()
    # Allows a temperature other than 1 and a top_p below 1, which make on-policy estimators biased.
    allow_biased: bool = False
    # Longest prompt in tokens; 0: what fits the context window.
    max_prompt_tokens: Annotated[int, Field(ge=0)] = 0
    # What happens to a longer prompt. "skip": it is counted and listed, and never trained on.
    long_prompts: Literal["refuse", "skip"] = "refuse"
    # Most turns of an attempt; 0: no limit.
    max_turns: Annotated[int, Field(ge=0)] = 0
    # Seconds for one answer of a task's environment.
    environment_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    # "auto": as stored, but float32 on a CPU that is slower in 16 bits.
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if self.train_max_tokens is not None:
            number(self.train_max_tokens, "train_max_tokens")
        if not all(self.stop):
            raise ValueError(
                "stop has an empty text, which every response would end with at once. Remove it from the list"
            )
        if isinstance(self.train_max_tokens, int | float) and self.train_max_tokens > self.max_tokens:
            raise ValueError(
                f"train_max_tokens = {self.train_max_tokens:g} is above max_tokens = {self.max_tokens}, "
                "which limits every response. Raise max_tokens, or leave train_max_tokens out"
            )

    @property
    def evaluation_positions(self) -> int:
        return self.max_tokens

    @property
    def precision(self) -> str:
        return self.dtype

    @property
    def skips_long_prompts(self) -> bool:
        return self.long_prompts == "skip"

    def draw(self, step: int) -> SamplingParams:
        cap = self.max_tokens if self.train_max_tokens is None else int(at(self.train_max_tokens, step))
        return SamplingParams(
            step, "train", min(cap, self.max_tokens), self.temperature, self.top_p, self.stop
        )

    @property
    def generation(self) -> Generation:
        return Generation(self.temperature, self.top_p, self.stop, self.max_prompt_tokens)
