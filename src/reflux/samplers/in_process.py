"""What every sampler in this process does: its own copy of the weights, and one batched call for the requests of a cohort."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reflux.gather import Gather
from reflux.types import Draw, Group, Prompt

if TYPE_CHECKING:
    from reflux.rundir import Run

Request = tuple[Prompt, int, Draw]


class InProcess(ABC):
    """`publish` waits for the model call in progress."""

    model: Any  # its `net` holds the weights

    def __init__(self, run: Run):
        self.run = run
        self.version = 0
        self._busy = asyncio.Lock()
        self._gather: Gather[Request, Group] = Gather(self._cohort)

    async def sample(self, prompt: Prompt, n: int, draw: Draw) -> Group:
        return await self._gather.ask((draw.purpose, draw.step), draw.cohort, prompt.id, (prompt, n, draw))

    async def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        async with self._busy:
            own = self.model.net.state_dict()
            with torch.no_grad():
                for name, value in weights.items():
                    own[name].copy_(value)
            self.version = version

    async def _cohort(self, requests: list[Request]) -> list[Group]:
        async with self._busy:
            return await self.run.off_loop(self._sample, requests)

    @abstractmethod
    def _sample(self, requests: list[Request]) -> list[Group]:
        """The groups of one cohort, in order."""
