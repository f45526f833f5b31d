"""Common base of the samplers in this process: an own copy of the student's weights, and one batched call for
the requests of a cohort (the groups of one optimiser step that are requested together).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from reflux.config.step_context import SamplingParams
from reflux.runtime.cohorts import Gather
from reflux.types import Group, Prompt

if TYPE_CHECKING:
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights

Request = tuple[Prompt, int, SamplingParams]


class InProcessSampler(ABC):
    """A sampler with a model in this process. `publish` waits for the model call in progress."""

    # The loaded model. `model.net` holds the weights.
    model: Any

    def __init__(self, services: Services):
        self.services = services
        self.version = 0
        # Held during a model call and while weights are replaced.
        self.busy = asyncio.Lock()
        self._gather: Gather[Request, Group] = Gather(self._groups)

    async def sample(self, prompt: Prompt, n: int, draw: SamplingParams) -> Group:
        return await self._gather.ask((draw.purpose, draw.step), draw.cohort, prompt.key, (prompt, n, draw))

    async def publish(self, weights: Weights, step: int) -> None:
        async with self.busy:
            own = self.model.net.state_dict()
            with torch.no_grad():
                for name, value in weights.tensors():
                    own[name].copy_(value)
            self.version = weights.version

    @abstractmethod
    async def _groups(self, requests: list[Request]) -> list[Group]:
        """The groups of one cohort, in order."""
