"""The model behind `teachers.local`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reflux.contexts.base import View
from reflux.errors import ModelError
from reflux.models import Model, load_model, load_tokenizer, parameter_count
from reflux.teachers.base import spoken_name
from reflux.tokens import check_same_tokens
from reflux.types import Attempt, HiddenTarget, Moment, TokenRollout, TopKTarget

if TYPE_CHECKING:
    from reflux.rundir import Run
    from reflux.teachers.local import Local

Asked = tuple[Attempt, View]


class LocalTeacher:
    """Reads prompt and response once, right-padded, and keeps the states that predict the response."""

    def __init__(self, cfg: Local, run: Run, name: str, model: Model):
        self.cfg, self.run, self.name, self.model = cfg, run, spoken_name(name, cfg), model
        self.parameters = parameter_count(model.net)
        self.renderer = model.renderer(cfg.system, cfg.template)

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: Local, run: Run, name: str) -> AsyncIterator[LocalTeacher]:
        where = f"teachers.{name}.model"
        tokenizer = await run.off_loop(load_tokenizer, cfg.model, where, cfg.trust_remote_code)
        check_same_tokens(run.tokenizer, tokenizer, name)
        model = await run.off_loop(
            partial(
                load_model,
                cfg.model,
                where,
                dtype=cfg.dtype,
                device=cfg.device,
                attention=cfg.attention,
                trust_remote_code=cfg.trust_remote_code,
                device_map=cfg.device_map,
            )
        )
        model.net.requires_grad_(False)
        yield cls(cfg, run, name, model)

    async def score(self, asked: Sequence[Asked], moment: Moment) -> None:
        await self.run.off_loop(self._score, list(asked))

    def _score(self, asked: list[Asked]) -> None:
        started = time.perf_counter()
        inputs = [self._sequence(attempt, view) for attempt, view in asked]
        order = sorted(range(len(asked)), key=lambda i: -len(inputs[i][0]))
        while order:
            count = max(1, self.cfg.batch_tokens // len(inputs[order[0]][0]))
            chunk, order = order[:count], order[count:]
            self._read([asked[i][0] for i in chunk], [inputs[i] for i in chunk])
        self.run.clock.add("teach", time.perf_counter() - started)

    def _sequence(self, attempt: Attempt, view: View) -> tuple[np.ndarray, int]:
        """The teacher's ids without the last token (nothing is asked about what follows it), and where the response starts."""
        rollout = attempt.rollout
        assert isinstance(rollout, TokenRollout)
        prompt = rollout.prompt_tokens
        if view.spans:
            raise ModelError(f"teachers.{self.name}: this context replaces text inside the response, which a local teacher cannot do")
        if view.messages != rollout.prompt.messages:
            prompt = np.asarray(self.renderer.ids(view.messages), dtype=np.int64)
        sequence = np.concatenate([prompt, rollout.tokens_T[:-1]])
        if len(sequence) > self.model.context_tokens:
            raise ModelError(
                f"teachers.{self.name}: prompt {rollout.prompt.id} and its answer take {len(sequence)} tokens, but its context holds "
                f"{self.model.context_tokens}. Lower sampler.max_tokens or sampler.max_prompt_tokens, or shorten the teacher's context."
            )
        return sequence, len(prompt)

    @torch.inference_mode()
    def _read(self, attempts: list[Attempt], inputs: list[tuple[np.ndarray, int]]) -> None:
        width = max(len(sequence) for sequence, _ in inputs)
        ids_BL = np.zeros((len(inputs), width), dtype=np.int64)
        for row, (sequence, _) in zip(ids_BL, inputs, strict=True):
            row[: len(sequence)] = sequence
        h_BLH = self.model.trunk(input_ids=torch.from_numpy(ids_BL).to(self.model.device), use_cache=False).last_hidden_state
        for attempt, (sequence, start), h_LH in zip(attempts, inputs, h_BLH, strict=True):
            h_TH = h_LH[start - 1 : len(sequence)]
            self._answer(attempt, h_TH)

    def _answer(self, attempt: Attempt, h_TH: Tensor) -> None:
        rollout, wants = attempt.rollout, self.run.wants
        assert isinstance(rollout, TokenRollout)
        logp_T = None
        if wants.logp or wants.candidates:
            tokens_T = torch.from_numpy(rollout.tokens_T).to(h_TH.device)
            logp_T = self.model.head.logp_of(h_TH, tokens_T).cpu().numpy()
        if wants.candidates:
            attempt.candidates[self.name] = self._candidates(rollout, h_TH, logp_T)
        attempt.targets[self.name] = HiddenTarget(teacher=self.name, h_TH=h_TH.to("cpu", copy=True), head=self.model.head, logp_T=logp_T)

    def _candidates(self, rollout: TokenRollout, h_TH: Tensor, logp_T: np.ndarray | None) -> TopKTarget:
        """The teacher's log-probs at the ids the student listed when it acted."""
        said = rollout.said
        if not isinstance(said, TopKTarget) or logp_T is None:
            raise ModelError(f"teachers.{self.name}: asked for candidates, but prompt {rollout.prompt.id} came without the student's top-k")
        ids_TK = torch.from_numpy(said.ids_TK).to(h_TH.device)
        logp_TK = self.model.head.logp_at(h_TH, ids_TK)
        return TopKTarget(teacher=self.name, ids_TK=said.ids_TK, logp_TK=logp_TK.cpu().numpy(), logp_T=logp_T)

    async def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Frozen."""

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Frozen: nothing was saved."""
