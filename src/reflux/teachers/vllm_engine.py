"""The opened teacher of `teachers.vllm`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from reflux.clients.inference import TextScorer
from reflux.clients.probe import probed_ids
from reflux.errors import ModelError, ServerError
from reflux.kernels.head import Head
from reflux.models.chat.renderer import Renderer
from reflux.models.chat.token_map import check_same_tokens, vocabulary_size
from reflux.models.head_files import load_head
from reflux.models.placement import pick_device
from reflux.models.sizes import size_of
from reflux.models.text import load_tokenizer
from reflux.runtime.timers import Overlapping
from reflux.runtime.together import together
from reflux.teachers.answer_cache import AnswerCache, Arrays
from reflux.teachers.base import TeacherRequest, alias_of
from reflux.teachers.readings import Reading, read_by
from reflux.teachers.replicas import Replicas
from reflux.teachers.sequences import asked_ids, hidden_answer, listed_by_student
from reflux.teachers.served import Asked, needed, refuse_broken, refuse_flat, refuse_foreign_head, scored
from reflux.types import GivenTarget, SampledTarget, TeacherAnswer, TokenRollout, TopKTarget

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.teachers.vllm import VLLM

# The share of failures is taken of at least so many attempts, so that one failure at the start ends no run.
LEAST_ASKED = 20


class VLLMTeacher:
    """A frozen model in one or several servers. `failed` of `asked` attempts had no usable answer."""

    def __init__(
        self,
        cfg: VLLM,
        context: PartContext,
        services: Services,
        replicas: Replicas,
        renderer: Renderer,
        head: Head | None,
    ):
        self.cfg, self.context, self.services = cfg, context, services
        self.name, self.table = alias_of(context.name, cfg), context.name
        self.replicas, self.renderer, self.head = replicas, renderer, head
        self.head_key = f"teachers.{context.name}"
        size = size_of(cfg.model, f"teachers.{context.name}.model")
        self.macs, self.window = size.macs or 0, size.context_tokens or 1 << 30
        self.vocabulary = vocabulary_size(services.tokenizer)
        self.cache = self._opened_cache()
        self.asked = self.failed = 0
        # of the groups that are scored beside each other
        self._scoring = Overlapping()

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: VLLM, context: PartContext, services: Services) -> AsyncIterator[VLLMTeacher]:
        where = f"teachers.{context.name}"
        load = partial(load_tokenizer, cfg.model, f"{where}.model", cfg.trust_remote_code)
        tokenizer = await services.run_model(load)
        check_same_tokens(services.tokenizer, tokenizer, context.name)
        vocabulary = vocabulary_size(tokenizer)
        ids = probed_ids(tokenizer)
        async with Replicas.opened(cfg, context.name, ids) as replicas:
            needed(cfg.gives, cfg.addresses[0], context.name, replicas.abilities)
            head = None
            if cfg.gives == "hidden":
                named = "head" if cfg.head else "model"
                head = load_head(
                    cfg.head or cfg.model,
                    f"{where}.{named}",
                    vocabulary,
                    pick_device(cfg.device),
                    cfg.temperature,
                    cfg.trust_remote_code,
                )
                h_TH = await replicas.ask(lambda scorer: scorer.hidden_at(ids, 1, cfg.adapter))
                refuse_foreign_head(
                    head, h_TH, ids, replicas.abilities.logp_T, cfg.temperature, f"{where}.{named}"
                )
            renderer = Renderer(tokenizer, cfg.system, cfg.template, context.student.prompt_suffix)
            teacher = cls(cfg, context, services, replicas, renderer, head)
            if head is not None:
                services.heads.add(teacher.head_key, head)
            try:
                yield teacher
            finally:
                services.heads.remove(teacher.head_key)

    def _opened_cache(self) -> AnswerCache | None:
        cfg, found = self.cfg, self.replicas.abilities
        if cfg.cache is None:
            return None
        asked = (cfg.model, cfg.adapter or "", cfg.dialect, found.version or "", cfg.gives, str(cfg.k))
        cache = AnswerCache(Path(cfg.cache).expanduser(), asked)
        cache.check_weights(self.table, found.logp_T)
        return cache

    async def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherAnswer]:
        texts = [read_by(self.name, request, self.renderer, self.window) for request in requests]
        self._scoring.begin()
        try:
            answers = await together(
                self._answer(request, reading) for request, reading in zip(requests, texts, strict=True)
            )
        finally:
            seconds = self._scoring.end() / max(1, len(requests))
        return [replace(answer, seconds=seconds) for answer in answers]

    async def _answer(self, request: TeacherRequest, reading: Reading) -> TeacherAnswer:
        rollout = request.rollout
        assert isinstance(rollout, TokenRollout)
        ids = [*reading.ids_L.tolist(), int(rollout.tokens_T[-1])]
        # Only these ids are part of the request, and so of its name in the cache.
        asked_TK = reading.spread(asked_ids(request)) if self.cfg.gives == "student_topk" else None
        self.asked += 1
        try:
            answered, read = await self._arrays(ids, reading.first, asked_TK)
            arrays = {name: values[reading.places] for name, values in answered.items()}
            return replace(await self._target(request, arrays), positions_read=read)
        except ServerError as error:
            self.failed += 1
            self._stop_above_share(error)
            return TeacherAnswer(error=f"teachers.{self.table}: {error}")

    def _stop_above_share(self, error: ServerError) -> None:
        share = self.cfg.max_failed_share
        if self.failed > share * max(self.asked, LEAST_ASKED):
            raise ModelError(
                f"teachers.{self.table}: {self.failed} of {self.asked} attempts got no usable answer, and "
                f"teachers.{self.table}.max_failed_share is {share:g}. The last reason: {error}"
            ) from error

    async def _arrays(self, ids: list[int], first: int, asked_TK: np.ndarray | None) -> tuple[Arrays, int]:
        """The answer as arrays, from the cache or from servers, and the number of positions read."""
        key = "" if self.cache is None else self.cache.key(ids, first, asked_TK)
        if self.cache is not None and (kept := self.cache.get(key)) is not None:
            return kept, 0
        starts = range(first, len(ids), self.cfg.max_rows)
        ends = [min(start + self.cfg.max_rows, len(ids)) for start in starts]
        pieces = await together(
            self._piece(ids[:end], start, None if asked_TK is None else asked_TK[start - first : end - first])
            for start, end in zip(starts, ends, strict=True)
        )
        arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        refuse_broken(arrays, self.vocabulary)
        if self.head is not None:
            await self.services.run_model(refuse_flat, self.head, arrays["h_TH"])
        if self.cache is not None:
            self.cache.put(key, arrays)
        return arrays, sum(ends)

    async def _piece(self, ids: list[int], first: int, asked_TK: np.ndarray | None) -> Arrays:
        k = self.cfg.k if self.cfg.gives == "teacher_topk" else 0
        asked = Asked(ids, first, asked_TK, k, self.cfg.adapter)

        async def question(scorer: TextScorer) -> Arrays:
            return await scored(scorer, self.cfg.gives, asked)

        return await self.replicas.ask(question)

    async def _target(self, request: TeacherRequest, arrays: Arrays) -> TeacherAnswer:
        if "h_TH" in arrays:
            return await self.services.run_model(self._hidden, request, arrays["h_TH"])
        if "ids_TK" in arrays:
            return TeacherAnswer(target=TopKTarget(teacher=self.name, **arrays))
        if "logp_T" in arrays:
            return TeacherAnswer(target=SampledTarget(teacher=self.name, **arrays))
        ids_TK, logp_TK = listed_by_student(request), arrays["logp_TK"]
        logp_T = logp_TK[:, 0].copy()
        if ids_TK is None:
            return TeacherAnswer(target=SampledTarget(teacher=self.name, logp_T=logp_T))
        target = GivenTarget(teacher=self.name, ids_TK=ids_TK, logp_TK=logp_TK[:, 1:].copy(), logp_T=logp_T)
        return TeacherAnswer(target=target, candidates=target)

    def _hidden(self, request: TeacherRequest, states_TH: np.ndarray) -> TeacherAnswer:
        head, required = self.head, request.requirements
        assert head is not None
        h_TH, logp_TK = torch.from_numpy(states_TH), None
        if required.logp or required.candidates:
            asked_TK = torch.from_numpy(asked_ids(request)).to(head.device)
            logp_TK = head.logp_at(h_TH.to(head.device), asked_TK).cpu().numpy()
        return hidden_answer(self.name, self.head_key, request, h_TH, logp_TK)

    async def publish(self, weights: Weights, step: int) -> None:
        """Does nothing: the teacher is frozen."""

    def save(self, folder: Path) -> None:
        """Writes nothing: the teacher is frozen, and its model is in the servers."""

    def load(self, folder: Path) -> None:
        """Reads nothing: `save` wrote nothing."""
