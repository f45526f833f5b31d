"""Common base of the samplers that sample texts with the student: what the fields that they share mean."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from reflux.config.context import Generation
from reflux.config.schedules import Number, at, number
from reflux.config.step_context import SamplingParams
from reflux.samplers.base import SamplerPart


def one_number(value: Any) -> Any:
    """The validator of `max_tokens`. ValueError for a schedule."""
    if isinstance(value, dict):
        raise ValueError(
            "max_tokens is one whole number, for evaluations too. Give the schedule to train_max_tokens, "
            "which caps training"
        )
    return value


class TextSampler(SamplerPart, Protocol):
    """The members that follow from fields that every such sampler has."""

    max_tokens: Any
    train_max_tokens: Number | None
    temperature: Any
    top_p: Any
    stop: tuple[str, ...]
    max_prompt_tokens: Any
    long_prompts: Literal["refuse", "skip"]
    dtype: Any

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
