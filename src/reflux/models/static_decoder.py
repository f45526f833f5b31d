"""Decoding on a GPU: a static key-value cache, and one CUDA graph per number of rows and columns.

A graph holds the model's own forward pass, its head and the draw. The host reads the drawn tokens back every
few tokens and sees which rows have ended; what such a row drew after its end is left out. The noise depends
on key and position only, so the turns are those of a decoder that stops at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from reflux.config.step_context import SamplingParams
from reflux.models.bucket import Bucket
from reflux.models.graphs import Graphs
from reflux.models.grouped_attention import group_heads
from reflux.models.static_cache import StaticMemory
from reflux.models.static_rows import StaticRows
from reflux.models.text import Model
from reflux.models.turns import TurnRequest

# graphs that are kept; the oldest is dropped first
_MOST = 64


class StaticDecoder:
    """The buffers and graphs of one model. Weights that are replaced in place, as `publish` does, keep them
    valid; where a parameter has moved, everything is captured again.
    """

    def __init__(self, model: Model):
        group_heads(model.net)
        self.model, self.graphs = model, Graphs()
        self.memory: StaticMemory | None = None
        self.buckets: dict[tuple[Any, ...], Bucket] = {}
        self.addresses = _addresses(model)

    def rows(self, asks: Sequence[TurnRequest]) -> StaticRows:
        addresses = _addresses(self.model)
        if addresses != self.addresses:
            self.addresses = addresses
            self.free()
        return StaticRows(self, asks)

    def room(self, like: Sequence[Tensor], rows: int, length: int) -> StaticMemory:
        """The memory, with space for `rows` x `length` tokens. like: as for `StaticMemory`."""
        if self.memory is None or self.memory.tokens < rows * length:
            self.free()
            self.memory = StaticMemory(like, rows * length)
        return self.memory

    def bucket(self, rows: int, length: int, draw: SamplingParams, top_k: int) -> Bucket:
        assert self.memory is not None
        key = (rows, length, draw.temperature, draw.top_p, top_k)
        if key not in self.buckets:
            while len(self.buckets) >= _MOST:
                del self.buckets[next(iter(self.buckets))]
            self.buckets[key] = Bucket(self.model, self.memory, rows, length, draw, top_k)
        return self.buckets[key]

    def free(self) -> None:
        """Give the buffers and graphs back. The next batch allocates and captures again."""
        self.memory = None
        for bucket in self.buckets.values():
            # Without a graph this is a method of the bucket itself, which would keep its buffers until Python
            # looks for cycles.
            bucket.replay = None
        self.buckets = {}
        self.graphs.forget()


def _addresses(model: Model) -> tuple[int, ...]:
    """Where the weights are. A captured graph reads these addresses."""
    net = model.net
    return tuple(tensor.data_ptr() for tensors in (net.parameters(), net.buffers()) for tensor in tensors)
