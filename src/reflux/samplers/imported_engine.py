"""The opened sampler of `samplers.imported`: attempts of the file as rollouts of this run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from reflux.config.step_context import SamplingParams
from reflux.errors import DataError
from reflux.models.chat.ends import special_ids
from reflux.models.chat.naming import about_prompt
from reflux.models.chat.renderer import Renderer
from reflux.models.generation_file import end_ids_of
from reflux.models.spans import CharacterSpans
from reflux.types import Attempt, Finish, Group, Prompt, Reward, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.samplers.base import OpenSampler
    from reflux.samplers.imported import Imported
    from reflux.samplers.imported_file import Entry
    from reflux.samplers.imported_lines import Stored

# The file of the run directory that has the line and the versions of each attempt.
NAME = "imported.jsonl"


class OpenImported:
    """The open sampler. `inner` samples from the student in evaluations. ends: the ids that end a turn."""

    def __init__(
        self,
        cfg: Imported,
        context: PartContext,
        services: Services,
        inner: OpenSampler,
        ends: Collection[int],
    ):
        self.cfg, self.context, self.services, self.inner, self.ends = cfg, context, services, inner, ends
        student, tokenizer = context.student, services.tokenizer
        self.renderer = Renderer(tokenizer, student.system, student.template, student.prompt_suffix)
        self.spans = CharacterSpans(tokenizer)
        self.special = sorted(special_ids(tokenizer, ends))
        self.version = 0
        prompts = cfg.tried(context.task, context.seed)
        self.groups = cfg.groups(prompts, context.numbers.group_size, context.seed)

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, cfg: Imported, context: PartContext, services: Services
    ) -> AsyncIterator[OpenImported]:
        async with cfg.generate.open(context, services) as inner:
            ends = end_ids_of(context.student, "learner.model", services.tokenizer)
            yield cls(cfg, context, services, inner, ends)

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        if draw.purpose != "train":
            return await self.inner.sample(prompt, n, draw)
        entries = self.groups.of_step(draw.step, self.context.numbers.prompts_per_step).get(prompt.key, ())
        if len(entries) != n:
            raise DataError(
                f"prompt {prompt.key} was asked for {n} attempts at step {draw.step + 1}, for which "
                f"{self.cfg.path} has {len(entries)}. The prompts of a step must be those of the sampler's "
                "`training_prompts`."
            )
        return [self._attempt(prompt, sample, entry, draw) for sample, entry in enumerate(entries)]

    async def publish(self, weights: Weights, step: int) -> None:
        self.version = weights.version
        await self.inner.publish(weights, step)

    def _attempt(self, prompt: Prompt, sample: int, entry: Entry, draw: SamplingParams) -> Attempt:
        stored = self.cfg.file.read(entry)
        lowest, highest = stored.versions
        row = {"step": draw.step + 1, "prompt": prompt.key, "sample": sample, "line": entry.number}
        self.services.append(NAME, {**row, "version_lowest": lowest, "version_highest": highest})
        reward = None if stored.reward is None else Reward(stored.reward)
        return Attempt(self._rollout(prompt, sample, stored, draw.max_positions), reward=reward)

    def _rollout(self, prompt: Prompt, sample: int, stored: Stored, most: int) -> TokenRollout:
        """most: the most sampled tokens; the rest is left out."""
        length = _length(stored.mask_T, most)
        tokens_T, mask_T = stored.tokens_T[:length], stored.mask_T[:length]
        raw_T = stored.logp_raw_T
        text, spans_T2 = self._decoded(tokens_T, mask_T)
        requirements = self.context.requirements
        return TokenRollout(
            prompt=prompt,
            sample=sample,
            # Of the student that trains on it next: the versions of another run do not count here.
            version=self.version,
            finish=self._finish(stored, length),
            mask_T=mask_T,
            logp_T=stored.logp_T[:length],
            logp_raw_T=None if raw_T is None else raw_T[:length],
            sampled_positions=0,
            prompt_tokens=self._prompt_tokens(prompt, stored),
            tokens_T=tokens_T,
            text=text,
            messages=(*prompt.messages, {"role": "assistant", "content": text}),
            spans_T2=spans_T2 if requirements.spans else None,
            special_T=np.isin(tokens_T, self.special) if requirements.specials else None,
        )

    def _prompt_tokens(self, prompt: Prompt, stored: Stored) -> np.ndarray:
        """Where the ids of the file must be those of the template, `imported_checks` has compared them."""
        if stored.prompt_tokens is not None:
            return stored.prompt_tokens
        with about_prompt(prompt.id):
            return np.asarray(self.renderer.ids(prompt.messages), dtype=np.int64)

    def _finish(self, stored: Stored, length: int) -> Finish:
        if length < len(stored.tokens_T):
            return "length"
        ended = bool(stored.mask_T[-1]) and int(stored.tokens_T[-1]) in self.ends
        return stored.finish or ("stop" if ended else "length")

    def _decoded(self, tokens_T: np.ndarray, mask_T: np.ndarray) -> tuple[str, np.ndarray]:
        """The text of the sampled tokens, turn by turn, and the characters of each token. Sampled tokens that
        follow one another are a turn.
        """
        runs: list[tuple[bool, list[int]]] = []
        for chosen, pairs in groupby(zip(mask_T.tolist(), tokens_T.tolist(), strict=True), lambda p: p[0]):
            runs.append((chosen, [token for _, token in pairs]))
        before = 0 if runs[0][0] else len(runs[0][1])
        rest = runs[1:] if before else runs
        lengths = [len(ids) for chosen, ids in rest if not chosen]
        turns = [(ids, self.spans.decode(ids)) for chosen, ids in rest if chosen]
        told = [
            (ids, text, after) for (ids, text), after in zip(turns, [*lengths, 0][: len(turns)], strict=True)
        ]
        spans_T2 = np.concatenate([np.zeros((before, 2), dtype=np.int64), self.spans.of_turns(told)])
        return "\n".join(text for _, text in turns), spans_T2


def _length(mask_T: np.ndarray, most: int) -> int:
    """The positions that are kept if at most `most` sampled tokens are, without unsampled ones at the cut."""
    chosen = np.flatnonzero(mask_T)
    return len(mask_T) if len(chosen) <= most else int(chosen[most - 1]) + 1
