"""The model of `samplers.hf`. It decodes turns in batches, and a driver builds attempts from the turns of one
cohort (the groups of one optimiser step that are requested together).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from reflux.errors import ModelError
from reflux.models.generate import decode
from reflux.models.sampling_way import sampling_way
from reflux.models.static_decoder import StaticDecoder
from reflux.models.text import Model, load_model
from reflux.models.token_budget import TokenBudget
from reflux.models.turns import Turn, TurnRequest
from reflux.rollouts.driver import Driver, Limits
from reflux.samplers.in_process_sampler import InProcessSampler, Request
from reflux.types import Group

if TYPE_CHECKING:
    from reflux.config.context import PartContext, StudentSpec
    from reflux.runtime.services import Services
    from reflux.samplers.hf import HF


class HFSampler(InProcessSampler):
    """A language model in this process. As a generator it continues token sequences; a driver builds attempts
    from the turns.
    """

    def __init__(self, cfg: HF, context: PartContext, services: Services, model: Model):
        super().__init__(services, model, context.numbers)
        self.cfg = cfg
        self.way = sampling_way(model)
        self.decoder, self.told = self.way.decoder, False
        self.budget = TokenBudget("sampler.batch_tokens", services.listener.noted, cfg.batch_tokens)
        limits = Limits(
            model.context_tokens,
            cfg.max_prompt_tokens,
            cfg.long_prompts,
            cfg.max_turns,
            cfg.environment_timeout_s,
        )
        self.driver = Driver(
            self,
            model.tokenizer,
            model.end_ids,
            context,
            limits,
            turns=cfg.turns,
            listener=services.listener,
            clock=services.clock,
        )

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, cfg: HF, context: PartContext, services: Services, model: StudentSpec | None = None
    ) -> AsyncIterator[HFSampler]:
        """A sampler of the student's model, or of `model` in its place."""
        acting = model or context.student
        load = partial(
            load_model,
            dtype=cfg.dtype,
            device=cfg.device,
            attention=cfg.attention,
            trust_remote_code=acting.trust_remote_code,
            base=acting.base_model,
        )
        loaded = await services.run_model(load, acting.model, "learner.model" if model is None else "model")
        loaded.net.requires_grad_(False)
        services.tell(loaded.notes)
        yield cls(cfg, context, services, loaded)

    async def _groups(self, requests: list[Request]) -> list[Group]:
        return await self.driver.play(requests, self.version)

    async def generate(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        async with self.live.call():
            return await self.services.run_model(self._generate, requests, interrupt=self.live.stop)

    def _generate(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """Decode the requests in chunks of similar length, cut by the token budget. The turns are returned in
        the order of the requests.
        """
        started, purpose = time.perf_counter(), requests[0].draw.purpose
        places = sorted(range(len(requests)), key=lambda place: -len(requests[place].ids))
        turns: dict[int, Turn] = {}
        while places:
            widest = len(requests[places[0]].ids) + max(requests[place].max_tokens for place in places)
            chunk = places[: max(1, self.budget.tokens // widest)]
            drawn = self._decoded([requests[place] for place in chunk])
            if drawn is not None:
                turns |= zip(chunk, drawn, strict=True)
                places = places[len(chunk) :]
            elif not self.budget.halve(widest):
                raise ModelError(
                    f"one text of up to {widest} tokens cannot be sampled in the memory of the device beside "
                    "the models. Lower sampler.max_tokens, or use sampler.dtype = 'bfloat16'."
                )
        if purpose == "train" and not self.told:
            self._tell()
        self.services.clock.sampled(requests[0].draw, started)
        return [turns[place] for place in range(len(requests))]

    def _decoded(self, asks: Sequence[TurnRequest]) -> list[Turn] | None:
        """The turns, each from a row of one batch; None if the memory of the device was exceeded. The turns
        do not depend on how many rows are decoded together.
        """
        try:
            return decode(self.model, asks, self.live.renew, self.decoder)
        except torch.OutOfMemoryError:
            pass
        if isinstance(self.decoder, StaticDecoder):
            self.decoder.free()
        return None

    def _tell(self) -> None:
        """After the first batch for training on a GPU: what the graphs cost, or why there are none."""
        self.told = True
        graphs = self.decoder.graphs if isinstance(self.decoder, StaticDecoder) else None
        if graphs or self.way.slow:
            cost = f", {graphs.captured} captured in {graphs.seconds:.1f} s" if graphs else ""
            self.services.listener.noted(f"sampling: {self.way.text}{cost}")
