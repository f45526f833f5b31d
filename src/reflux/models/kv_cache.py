"""A key-value cache whose buffers have space for later tokens. A new token is written in place, while a cache
layer of transformers copies all earlier positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """A key-value cache in which each full-attention layer (`DynamicLayer`) is a `RoomyLayer` with spare
    space for `room` more tokens. Sliding-window and recurrent layers stay as they are. config: of the model.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """A cache layer: `keys` and `values` [B, heads, L, D] are views of buffers with space for `room` more
    positions. The buffers are allocated again when this space is used up.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, *extra: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new positions. `extra` holds arguments of other kinds of layers and is ignored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < stop:
            self.buffers = (
                self._grown(self.keys, key_states, start, stop),
                self._grown(self.values, value_states, start, stop),
            )
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:stop, :] = new
        self.keys, self.values = (buffer[..., :stop, :] for buffer in self.buffers)
        return self.keys, self.values

    def _grown(self, old: Tensor | None, new: Tensor, start: int, stop: int) -> Tensor:
        buffer = new.new_empty(*new.shape[:-2], stop + self.room, new.shape[-1])
        if old is not None and start:
            buffer[..., :start, :] = old
        return buffer

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        # The kept rows are now copies without spare room; the next token allocates the buffers again.
        self.buffers = None
