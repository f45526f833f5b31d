"""The default sampler: a transformers model in this process, batched decoding with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from reflux.config.context import Generation
from reflux.config.registry import STRICT
from reflux.config.schedules import Number, at, number
from reflux.config.step_context import SamplingParams
from reflux.models.folders import Dtype
from reflux.samplers.base import SamplerPart
from reflux.types import Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


def _one_number(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError(
            "max_tokens is one whole number, for evaluations too. Give the schedule to train_max_tokens, "
            "which caps training"
        )
    return value


@dataclass(frozen=True, config=STRICT)
class HF(SamplerPart):
    """transformers in this process, in batches; every row has its own random numbers.

    `max_tokens` is the longest answer: evaluations and extrapolation's score are cut there and nowhere else.
    `train_max_tokens` is a cap of training alone, where a schedule may begin with short answers; a schedule
    that goes above `max_tokens` stays at it.

    The noise depends on (run seed, purpose, step, prompt, sample, turn, position) alone, so a batch never
    changes a draw's dice. Where a task has several turns, `turns` says whose next one is generated at once:
    "together", all attempts that go on, once the last environment has answered, so that a run repeats bit for
    bit; "ready", those that are answered, so that a slow tool holds up its own attempt alone, and the last
    digits of log-probs depend on timing.

    Temperature other than 1, or top_p below 1, makes on-policy estimators biased: refused unless
    allow_biased. What remains of the bias then: the ratio of `sampled_kl` and `policy_gradient` divides by
    the probability that a token was drawn with, so the choice at each prefix is corrected while no bound
    binds; tokens that top_p leaves out are never learnt from; and which prefixes are visited stays another
    distribution's.
    """

    on_policy: ClassVar[bool] = True
    rollouts: ClassVar[type[Rollout]] = TokenRollout

    # of the student, over all its turns
    max_tokens: Annotated[int, Field(ge=1), BeforeValidator(_one_number)] = 512
    # of an attempt of training; not set: max_tokens
    train_max_tokens: Number | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    # texts that end an answer, besides the model's end tokens
    stop: tuple[str, ...] = ()
    allow_biased: bool = False
    # 0: what the context window leaves
    max_prompt_tokens: Annotated[int, Field(ge=0)] = 0
    # skip: counted and listed, never trained on
    long_prompts: Literal["refuse", "skip"] = "refuse"
    # rows x (prompt + answer), padding included, decoded together
    batch_tokens: Annotated[int, Field(ge=1)] = 32768
    # whose next turn is generated at once, where a task has several
    turns: Literal["together", "ready"] = "together"
    # of an attempt; 0: no limit
    max_turns: Annotated[int, Field(ge=0)] = 0
    # of one answer of a task's environment
    environment_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    # auto: as stored
    dtype: Dtype = "auto"
    device: str = "auto"
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.train_max_tokens is not None:
            number(self.train_max_tokens, "train_max_tokens")
        if isinstance(self.train_max_tokens, int | float) and self.train_max_tokens > self.max_tokens:
            raise ValueError(
                f"train_max_tokens = {self.train_max_tokens:g} is above max_tokens = {self.max_tokens}, the "
                "longest answer anywhere. "
                f"Raise max_tokens, or leave train_max_tokens out"
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.task.multi_turn and (self.max_turns or self.turns != "together"):
            yield f"{where}: max_turns and turns change nothing: the prompts of this task are answered in one turn."

    @property
    def evaluation_positions(self) -> int:
        return self.max_tokens

    @property
    def exact_rng(self) -> bool:
        return self.turns == "together"

    @property
    def overlaps(self) -> bool:
        return self.turns == "ready"

    def draw(self, step: int) -> SamplingParams:
        cap = self.max_tokens if self.train_max_tokens is None else int(at(self.train_max_tokens, step))
        return SamplingParams(
            step, "train", min(cap, self.max_tokens), self.temperature, self.top_p, self.stop
        )

    @property
    def generation(self) -> Generation:
        return Generation(self.temperature, self.top_p, self.stop, self.max_prompt_tokens)

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.samplers.hf_engine import HFSampler

        return HFSampler.opened(self, context, services)

    def open_with(
        self, model: Any, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[Any]:
        from reflux.samplers.hf_engine import HFSampler

        return HFSampler.opened(self, context, services, model)
