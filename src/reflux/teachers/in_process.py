"""What every teacher in this process does: read prompt and response once, and keep the states that predict the response."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from reflux.contexts.base import View
from reflux.errors import ModelError
from reflux.models import Model, parameter_count
from reflux.teachers.base import Teacher, spoken_name
from reflux.tokens import Renderer
from reflux.types import Attempt, HiddenTarget, Moment, TokenRollout, TopKTarget

if TYPE_CHECKING:
    from reflux.rundir import Run

Asked = tuple[Attempt, View]


class Batched(Teacher, Protocol):
    """A teacher's config that says how much is read at once."""

    @property
    def batch_tokens(self) -> int: ...


class InProcess:
    """A model that answers with hidden states. It reads right-padded: padding lies in the causal future, so no mask is needed."""

    def __init__(self, cfg: Batched, run: Run, name: str, model: Model, renderer: Renderer):
        self.batch_tokens, self.run, self.name, self.model, self.renderer = cfg.batch_tokens, run, spoken_name(name, cfg), model, renderer
        self.parameters = parameter_count(model.net)
        model.net.requires_grad_(False)

    def precision(self) -> AbstractContextManager[Any]:
        """What the passes run under."""
        return nullcontext()

    async def score(self, asked: Sequence[Asked], moment: Moment) -> None:
        await self.run.off_loop(self._score, list(asked))

    def _score(self, asked: list[Asked]) -> None:
        started = time.perf_counter()
        inputs = [self._sequence(attempt, view) for attempt, view in asked]
        order = sorted(range(len(asked)), key=lambda i: -len(inputs[i][0]))
        while order:
            count = max(1, self.batch_tokens // len(inputs[order[0]][0]))
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
        with self.precision():
            h_BLH = self.model.trunk(input_ids=torch.from_numpy(ids_BL).to(self.model.device), use_cache=False).last_hidden_state
        states = [h_LH[start - 1 : len(sequence)] for (sequence, start), h_LH in zip(inputs, h_BLH, strict=True)]
        self._refuse_nan(attempts, states)
        for attempt, h_TH in zip(attempts, states, strict=True):
            self._answer(attempt, h_TH)

    def _refuse_nan(self, attempts: list[Attempt], states: list[Tensor]) -> None:
        """Finite states at every position, and log-probs at the first (a head that makes a number of one row makes one of all)."""
        first_BH = torch.stack([h_TH[0] for h_TH in states])
        nan_B = self.model.head.logits(first_BH).float().log_softmax(-1).isnan().any(-1)
        bad_B = nan_B | torch.stack([~h_TH.isfinite().all() for h_TH in states]).to(nan_B.device)
        for index in bad_B.nonzero().flatten().tolist()[:1]:
            rollout = attempts[index].rollout
            raise ModelError(
                f"teachers.{self.name}: its logits for prompt {rollout.prompt.id}, sample {rollout.sample} are not numbers. Are its "
                f"weights whole? In float16 large values overflow: use dtype bfloat16 or float32."
            )

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
