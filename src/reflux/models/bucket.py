"""The rows that one CUDA graph decodes: a fixed number of rows and columns, with all state in tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from reflux.config.step_context import SamplingParams
from reflux.models.graphs import Graphs
from reflux.models.picking import pick
from reflux.models.static_cache import StaticMemory
from reflux.models.text import Model

# Number of tokens per row that are drawn before the host reads them back.
LOOK_EVERY = 16


class Bucket:
    """`rows` texts of at most `length` columns, padded on the left. `step` draws one more token per row and
    waits for nothing: positions, masks and results are tensors.
    """

    def __init__(
        self, model: Model, memory: StaticMemory, rows: int, length: int, draw: SamplingParams, k: int
    ):
        self.model, self.rows, self.length, self.how, self.top_k = model, rows, length, draw, k
        device = model.device
        # the column of the next token, and the line of the results that it is written to
        self.column_1, self.line_1 = torch.zeros(2, 1, dtype=torch.int64, device=device)
        # per row: the last token, its position in its own text, the noise key, the number of tokens drawn
        self.tokens_B, self.place_B, self.keys_B, self.drawn_B = torch.zeros(
            4, rows, dtype=torch.int64, device=device
        )
        # 0 on left padding, else 1; the model's own mask hides the columns after the current one
        self.mask_BM = torch.ones(rows, length, dtype=torch.int64, device=device)
        self.cache = memory.cache(rows, length, self.column_1)
        self.results = _results(model, rows, min(k, model.vocabulary))
        names = inspect.signature(model.trunk.forward).parameters
        # Models without position embeddings have no argument for positions.
        self.placed = {"position_ids": self.place_B[:, None]} if "position_ids" in names else {}
        self.replay: Callable[[], None] | None = None

    @property
    def _by_row(self) -> tuple[Tensor, ...]:
        return self.tokens_B, self.place_B, self.keys_B, self.drawn_B, self.mask_BM

    @property
    def _moving(self) -> tuple[Tensor, ...]:
        """What a step moves on."""
        return self.column_1, self.line_1, self.tokens_B, self.place_B, self.drawn_B

    def step(self, graphs: Graphs) -> None:
        if self.replay is None:
            self.replay = graphs.of(self._step, self._moving)
        self.replay()

    def _step(self) -> None:
        read = {
            "attention_mask": self.mask_BM,
            "use_cache": True,
            "past_key_values": self.cache,
            **self.placed,
        }
        h_BLH = self.model.trunk(input_ids=self.tokens_B[:, None], **read).last_hidden_state
        self.column_1 += 1
        # A finished row goes on, and must stay within the table of positions.
        self.place_B.add_(1).clamp_(max=self.model.context_tokens - 1)
        self.take(self.model.head.logits(h_BLH[:, -1]))

    def take(self, logits_BV: Tensor) -> None:
        """Draw from the logits and write down what was drawn."""
        picked = pick(logits_BV, self.keys_B, self.drawn_B, self.how, self.top_k)
        for result, column in zip(self.results, picked, strict=True):
            result.index_copy_(0, self.line_1, column[None].to(result.dtype))
        self.tokens_B.copy_(picked[0])
        self.drawn_B += 1
        self.line_1 += 1

    def begin(self, length_B: Tensor, width: int, keys_B: Tensor, drawn_B: Tensor) -> None:
        """Prompts of `width` columns have been read; length_B: their lengths without padding. drawn_B: the
        numbers of tokens at their ends that were drawn before.
        """
        count = len(length_B)
        for state in (self.place_B, self.keys_B, self.drawn_B, self.line_1):
            state.zero_()
        self.column_1.fill_(width)
        self.place_B[:count], self.keys_B[:count], self.drawn_B[:count] = (
            given_B.to(self.place_B.device) for given_B in (length_B, keys_B, drawn_B)
        )
        columns_M = torch.arange(self.length, device=self.mask_BM.device)
        self.mask_BM.copy_(columns_M >= width - self.place_B[:, None])

    def take_over(self, other: Bucket, index: Tensor) -> None:
        """Go on with the rows `index` of another bucket of the same length."""
        self.column_1.copy_(other.column_1)
        for mine, theirs in zip(self._by_row, other._by_row, strict=True):
            mine.copy_(theirs[index])


def _results(model: Model, rows: int, k: int) -> tuple[Tensor, ...]:
    """Space for the columns [C, B, ...] that `pick` gives."""
    kinds = [(torch.int64, ()), (torch.float32, ()), (torch.float32, ())]
    kinds += [(torch.int64, (k,)), (torch.float32, (k,))] if k else []
    return tuple(
        torch.zeros(LOOK_EVERY, rows, *more, dtype=dtype, device=model.device) for dtype, more in kinds
    )
