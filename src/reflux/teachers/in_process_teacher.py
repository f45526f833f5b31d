"""Common base of the text teachers in this process. Prompt and response are read once, and the hidden states
that predict the response are kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from reflux.errors import ModelError
from reflux.models.chat.renderer import Renderer
from reflux.models.cut import cut
from reflux.models.packed_attention import attending_packed, why_padded
from reflux.models.parameters import parameter_count
from reflux.models.placement import autocast
from reflux.models.text import Model
from reflux.models.text_rows import packed, padded
from reflux.models.token_budget import TokenBudget
from reflux.teachers.base import Teacher, TeacherRequest, alias_of
from reflux.teachers.readings import Reading, read_by
from reflux.teachers.sequences import asked_ids, hidden_answer
from reflux.types import TeacherAnswer

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services


class Batched(Teacher, Protocol):
    """The config of a teacher that sets how many tokens are read at once."""

    @property
    def batch_tokens(self) -> int: ...


class InProcessTeacher:
    """A model that answers with hidden states. It reads padded or packed rows (`models.text_rows`)."""

    def __init__(
        self,
        cfg: Batched,
        context: PartContext,
        services: Services,
        model: Model,
        renderer: Renderer,
        *,
        frozen: bool = True,
    ):
        """frozen: False for a model that something else trains."""
        if frozen:
            model.net.requires_grad_(False)
        self.context, self.services = context, services
        self.name, self.model, self.renderer = alias_of(context.name, cfg), model, renderer
        key = f"teachers.{context.name}.batch_tokens"
        self.budget = TokenBudget(key, services.listener.noted, cfg.batch_tokens)
        self.macs = parameter_count(model.net)
        self.head = services.heads.add(f"teachers.{context.name}", model.head)
        # Reading changes the model for a time: its attention, and where its weights are. With max_staleness
        # above 0 two steps may ask in two threads.
        self._turn = threading.Lock()
        # "" where rows are packed, else the reason for padding
        self.padded_because = why_padded(model, autocast(self.autocast, model.device))

    def here(self) -> AbstractContextManager[Any]:
        """The context in which the model's weights are on its device."""
        return nullcontext()

    @property
    def autocast(self) -> str:
        """As in a recipe: "auto" for bfloat16 autocast on a GPU."""
        return "off"

    def close(self) -> None:
        """Remove the model and its output head (the matrix that maps hidden states to logits). Targets that
        were given earlier cannot be read afterwards.
        """
        self.services.heads.remove(self.head)

    async def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
        return await self.services.run_model(self.answer, list(requests))

    def answer(self, requests: list[TeacherRequest]) -> list[TeacherAnswer]:
        """As `score`, in this thread."""
        with self._turn, self.here():
            return self._scored(requests)

    def _scored(self, requests: list[TeacherRequest]) -> list[TeacherAnswer]:
        started = time.perf_counter()
        window = self.model.context_tokens
        inputs = [read_by(self.name, request, self.renderer, window) for request in requests]
        longest = max((len(reading.ids_L) for reading in inputs), default=0)
        while (answers := self._all_read(requests, inputs)) is None:
            if not self.budget.halve(longest):
                raise ModelError(
                    f"teachers.{self.name}: one text of {longest} tokens does not fit into the memory of the "
                    "device beside the models. Lower sampler.max_tokens, or use dtype = 'bfloat16'."
                )
        seconds = (time.perf_counter() - started) / max(1, len(requests))
        return [replace(answers[i], seconds=seconds) for i in range(len(requests))]

    def _all_read(
        self, requests: list[TeacherRequest], inputs: list[Reading]
    ) -> dict[int, TeacherAnswer] | None:
        """The answers by the index of the request; None if the memory of the device was exceeded."""
        order = sorted(range(len(requests)), key=lambda i: -len(inputs[i].ids_L))
        lengths = [len(inputs[i].ids_L) for i in order]
        answers: dict[int, TeacherAnswer] = {}
        try:
            for part in cut(lengths, lambda: self.budget.tokens, not self.padded_because):
                chunk = order[part]
                read = self._read([requests[i] for i in chunk], [inputs[i] for i in chunk])
                answers |= zip(chunk, read, strict=True)
        except torch.OutOfMemoryError:
            return None
        return answers

    @torch.inference_mode()
    def _read(self, requests: list[TeacherRequest], inputs: list[Reading]) -> list[TeacherAnswer]:
        pack, texts = not self.padded_because, [reading.ids_L for reading in inputs]
        rows = packed(texts, self.model.device) if pack else padded(texts, self.model.device)
        attending = attending_packed(self.model.net) if pack else nullcontext()
        with autocast(self.autocast, self.model.device), attending:
            h_NH = rows.states(self.model.trunk)
        states = [
            h_NH[start + reading.first - 1 : start + len(reading.ids_L)][reading.places]
            for start, reading in zip(rows.starts, inputs, strict=True)
        ]
        self._refuse_nan(requests, states)
        # The last token is counted too, as in all token counts.
        read = [len(reading.ids_L) + 1 for reading in inputs]
        return [
            replace(answer, positions_read=count)
            for answer, count in zip(self._answers(requests, states), read, strict=True)
        ]

    def _refuse_nan(self, requests: list[TeacherRequest], states: list[Tensor]) -> None:
        """Check that all hidden states are finite, and that the log-probs of one row are not NaN. One row is
        enough: a head that gives NaN for one row gives NaN for all rows.
        """
        # One read for all texts, because a GPU waits at each.
        finite = torch.stack([h_TH.isfinite().all() for h_TH in states]).tolist()
        bad = [index for index, right in enumerate(finite) if not right]
        if not bad and self.model.head.logits(states[0][:1]).float().log_softmax(-1).isnan().any():
            bad = [0]
        for index in bad[:1]:
            rollout = requests[index].rollout
            raise ModelError(
                f"teachers.{self.name}: its logits for prompt {rollout.prompt.id}, sample {rollout.sample} "
                "are not numbers. Check that its weights are complete. In float16 large values overflow: use "
                "dtype bfloat16 or float32."
            )

    def _answers(self, requests: list[TeacherRequest], states: list[Tensor]) -> list[TeacherAnswer]:
        """Targets, and the log-probs that are required at scoring time, from one pass of all rows through the
        output head.

        Only training attempts have the student's top-k list. Evaluation attempts have none and get no
        candidates.
        """
        wanted = any(request.requirements.logp or request.requirements.candidates for request in requests)
        listed = self._logp(requests, states) if wanted else [None] * len(states)
        return [
            hidden_answer(self.name, self.head, request, h_TH.to("cpu", copy=True), logp_TK)
            for request, h_TH, logp_TK in zip(requests, states, listed, strict=True)
        ]

    def _logp(self, requests: list[TeacherRequest], states: list[Tensor]) -> list[np.ndarray]:
        """Per attempt the log-probs of the sampled tokens [T, 1], or of these and of the student's recorded
        top-k [T, 1 + K].
        """
        ids = [asked_ids(request) for request in requests]
        widest = max(ids_TK.shape[1] for ids_TK in ids)
        padded = np.concatenate(
            [np.pad(ids_TK, ((0, 0), (0, widest - ids_TK.shape[1])), mode="edge") for ids_TK in ids]
        )
        logp_NK = self.model.head.logp_at(torch.cat(states), torch.from_numpy(padded).to(states[0].device))
        rows = logp_NK.cpu().numpy()
        ends = np.cumsum([len(ids_TK) for ids_TK in ids])
        return [
            rows[end - len(ids_TK) : end, : ids_TK.shape[1]] for end, ids_TK in zip(ends, ids, strict=True)
        ]
