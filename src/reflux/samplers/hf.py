"""The default sampler: a transformers model in this process, with batched decoding and a key-value cache."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.models.placement import Device
from reflux.samplers.text_sampler import TextSampler

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services


@dataclass(frozen=True, config=STRICT)
class HF(TextSampler):
    """Samples with transformers in this process, in batches. Each row has its own random numbers.

    `max_tokens` limits the response in tokens. It is the only limit of evaluations and of extrapolation's
    score. `train_max_tokens` is an additional cap for training. It may be a schedule that begins with short
    responses; where it is above `max_tokens`, `max_tokens` holds.

    The random numbers depend only on (run seed, purpose, step, prompt, sample, turn, position), so the
    composition of a batch never changes them. On a GPU every token is decoded by a CUDA graph, where the
    model allows it; `reflux doctor` says which way is taken.

    For tasks with several turns, `turns` sets when the next turns are generated. "together": for all attempts
    that continue, after the last environment has answered, so that a run repeats bit for bit. "ready": for
    those attempts whose environment has answered, so that a slow tool delays only its own attempt; the last
    digits of log-probs then depend on timing.

    A temperature other than 1, or a top_p below 1, makes on-policy estimators biased. It is refused unless
    allow_biased is set. Part of the bias is corrected: the ratio of `sampled_kl` and `policy_gradient`
    divides by the probability that a token was sampled with, so the choice at each prefix is corrected while
    the ratio is not clipped. The rest of the bias remains: tokens that top_p leaves out are never trained on,
    and the prefixes come from the changed sampling distribution.
    """

    # Tokens decoded together: rows x (prompt + response), padding included.
    batch_tokens: Annotated[int, Field(ge=1)] = 32768
    # When the next turns are generated, for tasks with several turns.
    turns: Literal["together", "ready"] = "together"
    device: Device = "auto"
    # The `attn_implementation` argument of transformers.
    attention: str | None = None

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not cfg.task.multi_turn and (self.max_turns or self.turns != "together"):
            yield (
                f"{where}: max_turns and turns have no effect, because the prompts of this task are answered "
                "in one turn."
            )

    @property
    def cache_tokens(self) -> int:
        return self.batch_tokens

    def decoding(self, opened: Any) -> tuple[bool, str] | None:
        return opened.way.slow, opened.way.text

    @property
    def exact_rng(self) -> bool:
        return self.turns == "together"

    @property
    def overlaps(self) -> bool:
        return self.turns == "ready"

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.samplers.hf_engine import HFSampler

        return HFSampler.opened(self, context, services)

    def open_with(
        self, model: Any, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[Any]:
        from reflux.samplers.hf_engine import HFSampler

        return HFSampler.opened(self, context, services, model)
