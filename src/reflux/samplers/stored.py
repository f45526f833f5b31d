"""Given answers in place of sampled ones: plain fine-tuning, as a baseline and a cold start."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.context import Generation
from reflux.errors import DataError
from reflux.parts import STRICT, PartOf
from reflux.samplers.base import Sampler, SamplerPart
from reflux.samplers.hf import HF
from reflux.tokens import CharacterSpans, Renderer, end_ids
from reflux.types import Attempt, Draw, Group, Prompt, Rollout, TokenRollout

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.rundir import Run
    from reflux.samplers.base import OpenSampler


@dataclass(frozen=True, config=STRICT)
class Stored(SamplerPart):
    """Training attempts are the prompts' own `references`, as if the student had written them; evaluation really samples, by `generate`.

    Nothing here was drawn from the student, so only objectives that do not weigh by its probabilities fit (`nll`, `divergence`).
    """

    on_policy: ClassVar[bool] = False
    rollouts: ClassVar[type[Rollout]] = TokenRollout

    generate: Annotated[Sampler, PartOf("samplers", default="hf")] = HF()

    def draw(self, step: int) -> Draw:
        return replace(self.generate.draw(step), temperature=1.0, top_p=1.0)

    @property
    def evaluation_positions(self) -> int:
        return self.generate.evaluation_positions

    @property
    def generation(self) -> Generation:
        return self.generate.generation

    @property
    def allow_biased(self) -> bool:
        return False

    @asynccontextmanager
    async def _opened(self, run: Run) -> AsyncIterator[OpenStored]:
        async with self.generate.open(run) as inner:
            yield OpenStored(run, inner, self.generate, CharacterSpans(run.tokenizer))

    def open(self, run: Run) -> AbstractAsyncContextManager[OpenStored]:
        return self._opened(run)


@plain_dataclass
class OpenStored:
    run: Run
    inner: OpenSampler
    generate: Any
    spans: CharacterSpans
    version: int = 0

    async def sample(self, prompt: Prompt, n: int, draw: Draw) -> Group:
        if draw.purpose != "train":
            return await self.inner.sample(prompt, n, draw)
        if not prompt.references:
            raise DataError(f"prompt {prompt.id} has no stored answer to learn from: the task gives no 'references' for it")
        return [self._attempt(prompt, prompt.references[sample % len(prompt.references)], sample, draw) for sample in range(n)]

    async def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.version = version
        await self.inner.publish(weights, version)

    def _attempt(self, prompt: Prompt, answer: str, sample: int, draw: Draw) -> Attempt:
        tokenizer = self.run.tokenizer
        renderer = Renderer(tokenizer, self.generate.system, self.generate.template)
        tokens = renderer.answer_ids(prompt.messages, answer, end_ids(tokenizer))
        cut = tokens[: draw.length]
        text = self.spans.decode(cut) if self.run.wants.spans else answer  # spans are of the text that these very tokens decode to
        rollout = TokenRollout(
            prompt=prompt,
            sample=sample,
            version=self.version,
            finish="stop" if len(cut) == len(tokens) else "length",
            mask_T=np.ones(len(cut), dtype=bool),
            logp_T=np.zeros(len(cut), dtype=np.float32),  # nobody drew these tokens; `checks` keeps ratios away from them
            prompt_tokens=np.asarray(renderer.ids(prompt.messages), dtype=np.int64),
            tokens_T=np.asarray(cut, dtype=np.int64),
            text=text,
            messages=(*prompt.messages, {"role": "assistant", "content": answer}),
            spans_T2=self.spans(cut, text) if self.run.wants.spans else None,
        )
        return Attempt(rollout)
