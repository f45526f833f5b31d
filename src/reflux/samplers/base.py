"""A sampler: the student acts.

`open(run)` gives an object that holds its own copy of the weights. `sample` returns one group; `publish` puts new weights in place after
the model call in progress. What a sampled token is depends on (run seed, purpose, step, prompt id, sample, turn, position) and
`draw.dice` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, ClassVar, Protocol

from reflux.schedules import Number
from reflux.types import Draw, Group, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.rundir import Run


class OpenSampler(Protocol):
    async def sample(self, prompt: Prompt, n: int, draw: Draw) -> Group: ...

    async def publish(self, weights: Mapping[str, Tensor], version: int) -> None: ...


class Sampler(Protocol):
    on_policy: ClassVar[bool]  # False where the attempts were not written by the student of now
    max_tokens: Number
    temperature: float
    top_p: float
    stop: tuple[str, ...]

    def open(self, run: Run) -> AbstractAsyncContextManager[OpenSampler]: ...
