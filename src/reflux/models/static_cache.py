"""A key-value cache in buffers that stay where they are, so that a captured CUDA graph can be replayed on
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer


class FixedLayer(StaticLayer):
    """A cache layer of transformers over given buffers `keys` and `values` [B, heads, M, D]. It adds one
    token per row.

    column_1: the column that the token is written to. It is one tensor for all layers and is moved on after
    the forward pass, while a StaticLayer moves on one of its own. A layer with a sliding window keeps all
    positions too, and the mask of the model hides those before the window; so nothing depends on how many
    tokens were written, and one graph serves all steps.
    """

    def __init__(self, keys: Tensor, values: Tensor, column_1: Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.column_1 = keys, values, column_1
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, *extra: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one column. `extra` holds arguments of other kinds of layers and is ignored."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys, self.values
        return (
            keys.index_copy_(2, self.column_1, key_states),
            values.index_copy_(2, self.column_1, value_states),
        )

    def get_seq_length(self) -> Any:
        """A tensor without dimensions, as of a StaticLayer."""
        return self.column_1[0]


class StaticMemory:
    """Keys and values of all layers, in flat buffers with space for `tokens` tokens (rows x columns).

    Every cache begins at the start of the buffers. So only one is in use at a time, and fewer rows of the
    same length are its first rows. like: keys and values [B, heads, L, D] of all layers in turn, of any
    length, for their sizes and dtypes.
    """

    def __init__(self, like: Sequence[Tensor], tokens: int):
        self.tokens = tokens
        self.sizes = [(state.shape[1], state.shape[3]) for state in like]
        self.buffers = [state.new_zeros(tokens * state.shape[1] * state.shape[3]) for state in like]

    def states(self, rows: int, length: int) -> list[Tensor]:
        """Views [rows, heads, length, D] of keys and values in turn."""
        return [
            buffer[: rows * length * heads * size].view(rows, heads, length, size)
            for buffer, (heads, size) in zip(self.buffers, self.sizes, strict=True)
        ]

    def cache(self, rows: int, length: int, column_1: Tensor) -> Cache:
        states = self.states(rows, length)
        pairs = zip(states[::2], states[1::2], strict=True)
        return Cache(layers=[FixedLayer(keys, values, column_1) for keys, values in pairs])

    def clear(self, rows: int, length: int) -> None:
        """Set everything to 0. A masked position must hold a finite number, because 0 * inf is no number."""
        for state in self.states(rows, length):
            state.zero_()

    def keep(self, old: int, new: int, length: int, index: Tensor) -> None:
        """Move the rows `index` of `old` rows to the first `new` rows."""
        for source, target in zip(self.states(old, length), self.states(new, length), strict=True):
            target.copy_(source.index_select(0, index))
