"""The rows of one batch, in the buckets of a static decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reflux.models.bucket import LOOK_EVERY, Bucket
from reflux.models.prompts import Chunk, Prompts
from reflux.models.turns import TurnRequest

if TYPE_CHECKING:
    from reflux.models.static_decoder import StaticDecoder

# Rows are rounded up to one of these numbers times a power of two, and columns to one of the others.
_ROWS, _COLUMNS = (2, 3), (64, 80, 96, 112)
# A step with fewer rows than this is no faster.
_FEW = 8


class StaticRows:
    """The first `len(owners)` rows of a bucket. The other rows only fill it, and nothing reads what they
    draw.
    """

    def __init__(self, decoder: StaticDecoder, asks: Sequence[TurnRequest]):
        self.decoder, self.asks = decoder, asks
        self.owners = np.arange(len(asks))
        self.budgets = np.asarray([ask.max_tokens for ask in asks])
        # the number of tokens that each row has drawn, and the most that an unfinished row may still draw
        self.drawn, self.left = 0, int(self.budgets.max())
        self.bucket: Bucket | None = None

    def draw(self) -> Sequence[np.ndarray]:
        steps = count = min(LOOK_EVERY, self.left)
        if self.bucket is None:
            self.bucket, steps = self._begin(), count - 1
        else:
            self.bucket.line_1.zero_()
        for _ in range(steps):
            self.bucket.step(self.decoder.graphs)
        self.drawn += count
        return [column[:, : len(self.owners)] for column in _read_back(self.bucket.results, count)]

    def keep(self, going: list[int]) -> None:
        """Move the rows to a bucket of half the rows or less, where they fit into one."""
        self.left = int(self.budgets[self.owners[going]].max()) - self.drawn
        old, memory, rows = self.bucket, self.decoder.memory, max(_FEW, _rounded(len(going), _ROWS))
        assert old is not None
        assert memory is not None
        if 2 * rows > old.rows:
            return
        self.bucket = self.decoder.bucket(rows, old.length, old.how, old.top_k)
        index = torch.tensor(going + going[:1] * (rows - len(going)), device=self.decoder.model.device)
        memory.keep(old.rows, rows, old.length, index)
        self.bucket.take_over(old, index)
        self.owners = self.owners[going]

    def _begin(self) -> Bucket:
        """Read the prompts, and draw the first token of each row."""
        prompts = Prompts(self.decoder.model, [ask.ids for ask in self.asks])
        rows, length = _rounded(len(self.asks), _ROWS), _rounded(prompts.width + self.left, _COLUMNS)
        draw, top_k = self.asks[0].draw, self.asks[0].top_k
        chunks = prompts.chunks()
        chunk: Chunk | None = next(chunks)
        assert chunk is not None
        memory = self.decoder.room(chunk.states, rows, length)
        memory.clear(rows, length)
        states, h_BH = memory.states(rows, length), chunk.h_BH.new_zeros(rows, chunk.h_BH.shape[-1])
        while chunk is not None:
            chunk.write(states, h_BH, prompts.width)
            # Its copies of keys and values are freed before the next prompts are read.
            chunk = None
            chunk = next(chunks, None)
        bucket = self.decoder.bucket(rows, length, draw, top_k)
        keys_B, drawn_B = torch.tensor([[ask.rng_key for ask in self.asks], [ask.drawn for ask in self.asks]])
        bucket.begin(prompts.length_B, prompts.width, keys_B, drawn_B)
        bucket.take(self.decoder.model.head.logits(h_BH))
        return bucket


def _rounded(count: int, steps: Sequence[int]) -> int:
    """The smallest number >= count that is one of `steps` (ascending) times a power of two."""
    scale = 1
    while steps[-1] * scale < count:
        scale *= 2
    return next(step * scale for step in steps if step * scale >= count)


def _read_back(results: Sequence[Tensor], count: int) -> list[np.ndarray]:
    """Copies of the first `count` lines on the host. This waits for the device."""
    return [result[:count].to("cpu", copy=True).numpy() for result in results]
