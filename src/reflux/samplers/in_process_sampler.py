"""Common base of the samplers in this process: an own copy of the student's weights, and one batched call for
the requests of a cohort (the groups that are requested together).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from reflux.config.step_context import SamplingParams
from reflux.runtime.cohorts import Gather
from reflux.samplers.live_weights import LiveWeights
from reflux.types import Group, Prompt

if TYPE_CHECKING:
    from reflux.config.context import Numbers
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights

Request = tuple[Prompt, int, SamplingParams]


class InProcessSampler(ABC):
    """A sampler with a model in this process. model: `model.net` holds the weights.

    With order "ready" the weights change between two tokens, and several cohorts are in progress at the same
    time, so that one of them can use the model while another one waits for its environments. With order
    "strict" there is one cohort at a time, and the weights change between cohorts only.
    """

    def __init__(self, services: Services, model: Any, numbers: Numbers):
        self.services, self.model = services, model
        self.live = LiveWeights(model)
        strict = numbers.order == "strict"
        self._whole = asyncio.Lock() if strict else nullcontext()
        at_once = 1 if strict else numbers.max_staleness + 1
        self._gather: Gather[Request, Group] = Gather(self._cohort, at_once)

    @property
    def version(self) -> int:
        """The policy version of the weights."""
        return self.live.version

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        return await self._gather.ask((draw.purpose, draw.step), draw.cohort, prompt.key, (prompt, n, draw))

    async def publish(self, weights: Weights, step: int) -> None:
        async with self._whole:
            await self.live.publish(weights)

    async def _cohort(self, requests: list[Request]) -> list[Group]:
        async with self._whole:
            return await self._groups(requests)

    @abstractmethod
    async def _groups(self, requests: list[Request]) -> list[Group]:
        """The groups of one cohort, in order. Model calls are made inside `live.call`."""
