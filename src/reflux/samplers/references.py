"""Given answers in place of sampled ones: plain fine-tuning, as a baseline and a cold start."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass as plain_dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT, PartOf
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.errors import DataError
from reflux.models.chat.ends import special_ids
from reflux.models.chat.naming import about_prompt
from reflux.models.chat.renderer import Renderer
from reflux.models.generation_file import end_ids_of
from reflux.models.sizes import size_of
from reflux.models.spans import CharacterSpans
from reflux.samplers.base import Sampler
from reflux.samplers.hf import HF
from reflux.samplers.wrapping import WrappingSampler
from reflux.types import Attempt, Group, Prompt, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.samplers.base import OpenSampler


@dataclass(frozen=True, config=STRICT)
class References(WrappingSampler):
    """Training attempts are the prompts' own `references`, treated as if the student had sampled them.
    Evaluations sample with `generate`. An answer is cut at `generate`'s limit for training and where the
    student's context window ends.

    The attempts were not sampled from the student. Only objectives that do not use the student's sampling
    probabilities as weights are therefore allowed (`nll`, `divergence`).
    """

    on_policy: ClassVar[bool] = False
    reads_references: ClassVar[bool] = True
    rollouts: ClassVar[type[Rollout]] = TokenRollout

    # The sampler for evaluations.
    generate: Annotated[Sampler, PartOf("samplers", default="hf")] = HF()

    @asynccontextmanager
    async def _opened(self, context: PartContext, services: Services) -> AsyncIterator[OpenReferences]:
        async with self.generate.open(context, services) as inner:
            tokenizer, student = services.tokenizer, context.student
            renderer = Renderer(tokenizer, student.system, student.template, student.prompt_suffix)
            ends = end_ids_of(student, "learner.model", tokenizer)
            window = size_of(student.model, "learner.model", base=student.base_model).context_tokens
            yield OpenReferences(
                inner,
                renderer,
                ends,
                CharacterSpans(tokenizer),
                context.requirements,
                window or 1 << 30,
                self.generate.skips_long_prompts,
            )

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[OpenReferences]:
        return self._opened(context, services)


@plain_dataclass
class OpenReferences:
    inner: OpenSampler
    renderer: Renderer
    # The token ids that end a turn.
    ends: tuple[int, ...]
    spans: CharacterSpans
    requirements: Requirements
    # Tokens of the student's context window. Answers are cut where it ends.
    window: int
    # A longer prompt gives an attempt with finish "error" and no position. False: it is refused.
    skips: bool
    version: int = 0

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        if draw.purpose != "train":
            return await self.inner.sample(prompt, n, draw)
        if not prompt.references:
            raise DataError(
                f"prompt {prompt.id} has no stored answer to train on: the task gives no 'references' for it"
            )
        return [
            self._attempt(prompt, prompt.references[sample % len(prompt.references)], sample, draw)
            for sample in range(n)
        ]

    async def publish(self, weights: Weights, step: int) -> None:
        self.version = weights.version
        await self.inner.publish(weights, step)

    def _attempt(self, prompt: Prompt, answer: str, sample: int, draw: SamplingParams) -> Attempt:
        with about_prompt(prompt.id):
            prompt_ids = self.renderer.ids(prompt.messages)
            tokens = self.renderer.answer_ids(prompt.messages, answer, self.ends)
        room = self.window - len(prompt_ids)
        if room < 1 and not self.skips:
            raise DataError(
                f"prompt {prompt.id} has {len(prompt_ids)} tokens, and the student's context window of "
                f"{self.window} tokens leaves no room for an answer. Shorten it, or set "
                "sampler.generate.long_prompts = 'skip' to leave such prompts out."
            )
        cut = tokens[: max(0, min(draw.max_positions, room))]
        # Spans refer to characters of the text that exactly these tokens decode to.
        text = self.spans.decode(cut) if self.requirements.spans else answer
        rollout = TokenRollout(
            prompt=prompt,
            sample=sample,
            version=self.version,
            finish="error" if not cut else "stop" if len(cut) == len(tokens) else "length",
            mask_T=np.ones(len(cut), dtype=bool),
            sampled_positions=0,
            # These tokens were not sampled, so they have no log-probs. `checks` refuses objectives that use a
            # ratio.
            logp_T=np.zeros(len(cut), dtype=np.float32),
            prompt_tokens=np.asarray(prompt_ids, dtype=np.int64),
            tokens_T=np.asarray(cut, dtype=np.int64),
            text=text,
            messages=(*prompt.messages, {"role": "assistant", "content": answer}),
            spans_T2=self.spans(cut, text) if self.requirements.spans else None,
            special_T=np.isin(cut, sorted(special_ids(self.renderer.tokenizer, self.ends)))
            if self.requirements.specials
            else None,
        )
        return Attempt(rollout)
