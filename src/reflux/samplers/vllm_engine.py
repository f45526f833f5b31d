"""The opened sampler of `samplers.vllm`: turns from a server, attempts from the driver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from reflux.clients.inference import InferenceClient
from reflux.errors import BadAnswer, ConfigError, ServerError, ServerRefused
from reflux.models.chat.token_map import vocabulary_size
from reflux.models.generation_file import end_ids_of
from reflux.models.turns import Turn, TurnRequest
from reflux.rollouts.driver import Driver, Limits
from reflux.runtime.timers import Overlapping
from reflux.runtime.together import together
from reflux.samplers.vllm_served import Served
from reflux.samplers.vllm_turns import Turns, is_changed
from reflux.types import Group, Prompt

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.step_context import SamplingParams
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.samplers.vllm import VLLM


class VLLMSampler:
    """Attempts of single groups run beside each other, because the tokens of a request do not depend on other
    requests. As a generator it continues token sequences.
    """

    def __init__(self, cfg: VLLM, context: PartContext, services: Services, served: Served):
        self.cfg, self.services, self.served = cfg, services, served
        self.version = 0
        tokenizer = services.tokenizer
        end_ids = end_ids_of(context.student, "learner.model", tokenizer)
        self.turns = Turns(tokenizer, end_ids, vocabulary_size(tokenizer))
        limits = Limits(
            served.context_tokens,
            cfg.max_prompt_tokens,
            cfg.long_prompts,
            cfg.max_turns,
            cfg.environment_timeout_s,
        )
        self.driver = Driver(
            self,
            tokenizer,
            end_ids,
            context,
            limits,
            turns="ready",
            listener=services.listener,
            clock=services.clock,
        )
        # of requests in flight
        self.flying = Overlapping()

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: VLLM, context: PartContext, services: Services) -> AsyncIterator[VLLMSampler]:
        async with AsyncExitStack() as stack:
            served = await Served.open(cfg, context, services, stack)
            yield cls(cfg, context, services, served)

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        async with self.served.awake():
            return (await self.driver.play([(prompt, n, draw)], self.version))[0]

    async def publish(self, weights: Weights, step: int) -> None:
        await self.served.publish(weights)
        self.version = weights.version

    async def generate(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        purpose = requests[0].draw.purpose
        self.flying.begin()
        try:
            with self.services.clock.sampling(requests[0].draw):
                return await together(self._turn(ask) for ask in requests)
        finally:
            self.services.clock.add("sample" if purpose == "train" else purpose, self.flying.end())

    async def _turn(self, ask: TurnRequest) -> Turn:
        """The turn, also where the server is replaced meanwhile: a request that is sent again gives the same
        tokens from the same weights.
        """
        while True:
            server = await self.served.supervisor.ready()
            try:
                turn = await self._asked(server.requests, ask)
            except (ServerRefused, BadAnswer):
                # The request or the server's program is wrong, and another server would answer the same.
                raise
            except ServerError as error:
                await self.served.supervisor.lost(server, error)
                continue
            if turn is not None:
                self.served.supervisor.answered()
                return turn

    async def _asked(self, client: InferenceClient, ask: TurnRequest) -> Turn | None:
        """None where the server aborted the request."""
        adapter = self.served.delivery.adapter
        name = None if adapter is None else adapter.name
        answer = await client.generate(self.turns.request(ask, name))
        if answer.finish == "abort":
            return None
        raw = None
        if is_changed(ask.draw):
            if self.cfg.lora_rank:
                raise ConfigError(
                    f"a temperature of {ask.draw.temperature:g} cannot be used with sampler.lora_rank: vLLM "
                    "0.32 ends where it reads an answer once more while it has adapters. Remove lora_rank."
                )
            text = [*ask.ids, *answer.tokens_T.tolist()]
            raw = await client.listed(text, len(ask.ids), self.turns.listed(ask), name)
        return self.turns.turn(ask, answer, raw, None if adapter is None else adapter.version)
