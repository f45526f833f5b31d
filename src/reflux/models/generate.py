"""Batched decoding, from contexts to turns. Finished rows are removed from the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from reflux.errors import ModelError
from reflux.models.cpu.decoder import CpuDecoder
from reflux.models.picking import pick
from reflux.models.static_decoder import StaticDecoder
from reflux.models.text import Model
from reflux.models.token_steps import token_steps
from reflux.models.turns import Turn, TurnRequest
from reflux.models.written import Written

# Dropping finished rows copies the cache, so it is done when this fraction of the rows or less is
# unfinished.
_CROWDED = 0.85


class DrawnRows(Protocol):
    """The rows of a batch, each with its text, noise key and cache."""

    # the index of the request that each row belongs to
    owners: np.ndarray

    def draw(self) -> Sequence[np.ndarray]:
        """The next C >= 1 tokens of all rows: columns [C, B, ...] as `pick` gives them."""
        ...

    def keep(self, going: list[int]) -> None:
        """Only the rows `going` need more tokens; the others may be dropped."""
        ...


@torch.inference_mode()
def decode(
    model: Model,
    asks: Sequence[TurnRequest],
    renew: Callable[[], int],
    decoder: CpuDecoder | StaticDecoder | None = None,
) -> list[Turn]:
    """Sample one turn for each of `asks`, each as one row of the batch. Rows are padded on the left. A row
    stops at an end token, at its max_tokens, or at the token in which a stop text ends.

    renew: called before each draw. It may replace the weights, and returns their policy version, which is
    recorded for the tokens. After a change the unfinished rows are read again from their tokens, because
    their cached keys and values are those of the old weights. decoder: a faster way, where the model has one.
    """
    _refuse_beyond_window(model, asks)
    written, version = Written(model, asks), renew()
    rows, requests_B = _rows(model, asks, decoder), np.arange(len(asks))
    while True:
        going = written.add(requests_B[rows.owners], rows.draw(), version)
        if not going:
            return written.turns()
        before, version = version, renew()
        if version == before:
            rows.keep(going)
            continue
        requests_B, tokens = requests_B[rows.owners[going]], written.tokens_so_far
        rows = _rows(model, [_continued(asks[place], tokens[place]) for place in requests_B], decoder)


def _rows(model: Model, asks: Sequence[TurnRequest], decoder: CpuDecoder | StaticDecoder | None) -> DrawnRows:
    static = isinstance(decoder, StaticDecoder)
    return decoder.rows(asks) if static else OneByOne(model, asks, decoder)


def _continued(ask: TurnRequest, tokens: list[int]) -> TurnRequest:
    """The rest of a turn of which `tokens` are drawn."""
    drawn = len(tokens)
    return replace(ask, ids=ask.ids + tokens, max_tokens=ask.max_tokens - drawn, drawn=ask.drawn + drawn)


def _refuse_beyond_window(model: Model, asks: Sequence[TurnRequest]) -> None:
    longest = max(len(ask.ids) + ask.max_tokens for ask in asks)
    if longest > model.context_tokens:
        raise ModelError(
            f"a text of up to {longest} tokens was asked for, but the model's log-probs can be computed "
            f"again only up to {model.context_tokens} tokens: its context window ends there, or its rotary "
            "angles change there. Ask for fewer tokens."
        )


class OneByOne:
    """Rows whose tokens are read back after each step."""

    def __init__(self, model: Model, asks: Sequence[TurnRequest], decoder: CpuDecoder | None):
        self.model, self.asks = model, asks
        self.owners = np.arange(len(asks))
        self.position_B, self.keys_B = torch.tensor(
            [[ask.drawn for ask in asks], [ask.rng_key for ask in asks]],
            dtype=torch.int64,
            device=model.device,
        )
        self.steps = token_steps(model, decoder, max(ask.max_tokens for ask in asks))
        # the tokens that the rows have drawn last
        self.tokens_B: Tensor | None = None

    def draw(self) -> Sequence[np.ndarray]:
        h_BH = self._read_prompts() if self.tokens_B is None else self.steps.step(self.tokens_B)
        draw, behaviour_k = self.asks[0].draw, self.asks[0].top_k
        picked = pick(self.model.head.logits(h_BH), self.keys_B, self.position_B, draw, behaviour_k)
        self.tokens_B, self.position_B = picked[0], self.position_B + 1
        return [column[None].cpu().numpy() for column in picked]

    def _read_prompts(self) -> Tensor:
        width = max(len(ask.ids) for ask in self.asks)
        ids_BP, mask_BP = torch.zeros(2, len(self.asks), width, dtype=torch.int64)
        for row, ask in enumerate(self.asks):
            ids_BP[row, width - len(ask.ids) :] = torch.tensor(ask.ids)
            mask_BP[row, width - len(ask.ids) :] = 1
        device = self.model.device
        return self.steps.begin(ids_BP.to(device), mask_BP.to(device))

    def keep(self, going: list[int]) -> None:
        if len(going) > _CROWDED * len(self.owners):
            return
        assert self.tokens_B is not None
        index = torch.tensor(going, device=self.model.device)
        self.owners, self.keys_B, self.position_B = (
            self.owners[going],
            self.keys_B[index],
            self.position_B[index],
        )
        self.tokens_B = self.tokens_B[index]
        self.steps.keep(index)
