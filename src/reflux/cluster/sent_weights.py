"""The student's weights in Ray's object store: put there once for each version, and read by every actor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch
from torch import Tensor

from reflux.cluster.wire import Packed, packed
from reflux.runtime.weights import AdapterWeights, InMemory

if TYPE_CHECKING:
    from reflux.runtime.weights import Weights

# Weights are put into the store in pieces of about so many bytes, so no second copy of the model is made.
PIECE_BYTES = 1 << 28
_NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SentWeights:
    """Weights of one version. Ray frees them when no process holds this object any more.

    pieces: references to tables of tensors by name. adapter: the config of the adapter, and a reference to
    its tensors; None without one.
    """

    version: int
    pieces: tuple[Any, ...]
    adapter: tuple[Mapping[str, Any], Any] | None = None

    @classmethod
    def put(cls, weights: Weights, precision: str) -> SentWeights:
        """precision: the data type of the sampler, in which floating-point weights are sent where it has 16
        bits. Copying them into the sampler rounds them in the same way.
        """
        adapter = weights.adapter
        pieces = _pieces(weights.tensors(), _NARROW.get(precision))
        sent = tuple(ray.put(packed(piece)) for piece in pieces)
        kept = None if adapter is None else (dict(adapter.config), ray.put(packed(list(adapter.read()))))
        return cls(weights.version, sent, kept)

    async def fetched(self) -> InMemory:
        """The weights in an actor. They are read from the object store of its machine, piece by piece."""
        pieces: list[Packed] = [await piece for piece in self.pieces]

        def read() -> Iterator[tuple[str, Tensor]]:
            for piece in pieces:
                yield from piece.value().items()

        if self.adapter is None:
            return InMemory(self.version, read)
        config, reference = self.adapter
        tensors: Packed = await reference
        return InMemory(self.version, read, adapter=AdapterWeights(config, tensors.value))


def _pieces(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """Tables of about `PIECE_BYTES` bytes."""
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        one = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if piece and size + one.nbytes > PIECE_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name] = one
        size += one.nbytes
    if piece:
        yield piece
