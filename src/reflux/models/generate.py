"""Batched decoding, from contexts to turns. Finished rows are removed from the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reflux.config.step_context import SamplingParams
from reflux.errors import ModelError
from reflux.models.cpu.decoder import CpuDecoder
from reflux.models.rng import gumbel
from reflux.models.stop_texts import StopTexts
from reflux.models.text import Model
from reflux.models.token_steps import token_steps
from reflux.models.turns import Turn, TurnRequest

# Dropping finished rows copies the cache, so it is done when this fraction of the rows or less is
# unfinished.
_CROWDED = 0.85
# a probability of 1 in the unit of the sums of `top_p`
_WHOLE = 1 << 40


@torch.inference_mode()
def decode(
    model: Model, asks: Sequence[TurnRequest], version: int, decoder: CpuDecoder | None = None
) -> list[Turn]:
    """Sample one turn for each of `asks`, each as one row of the batch. Rows are padded on the left. A row
    stops at an end token, at its max_tokens, or at the token in which a stop text ends.

    version: the policy version that is recorded for the tokens. decoder: a faster decoder for one more token
    per row, where the model has one.
    """
    _refuse_beyond_window(model, asks)
    draw, behaviour_k = asks[0].draw, asks[0].top_k
    rows, written = _Rows(model, asks, decoder), _Written(model, asks, draw)
    logits_BV = rows.read_prompts()
    position = 0
    while True:
        picked = _pick(logits_BV, rows.keys_B, position, draw, behaviour_k)
        going = written.add(rows.owners, picked)
        position += 1
        if not going:
            return written.turns(version)
        tokens_B = picked[0]
        if len(going) <= _CROWDED * len(rows.owners):
            tokens_B = tokens_B[rows.keep(going)]
        logits_BV = rows.advance(tokens_B)


def _refuse_beyond_window(model: Model, asks: Sequence[TurnRequest]) -> None:
    longest = max(len(ask.ids) + ask.max_tokens for ask in asks)
    if longest > model.context_tokens:
        raise ModelError(
            f"a text of up to {longest} tokens was asked for, but the model's log-probs can be computed "
            f"again only up to {model.context_tokens} tokens: its context window ends there, or its rotary "
            "angles change there. Ask for fewer tokens."
        )


class _Written:
    """The tokens of the rows so far. Every unfinished row has one token per step, so unfinished rows differ
    only in their budgets.
    """

    def __init__(self, model: Model, asks: Sequence[TurnRequest], draw: SamplingParams):
        self.stop = StopTexts(model.tokenizer, draw.stop) if draw.stop else None
        self.budgets, self.ends = np.asarray([ask.max_tokens for ask in asks]), np.asarray(model.end_ids)
        self.ended = np.zeros(len(asks), dtype=bool)
        self.over = np.zeros(len(asks), dtype=bool)
        # the tokens of each row; filled only if there are stop texts
        self.tokens: list[list[int]] = [[] for _ in asks]
        # characters of each row after the end of its stop text
        self.beyond = [0] * len(asks)
        # per step: the unfinished rows of the batch, the requests they belong to, and what was picked
        self.steps: list[tuple[list[int], np.ndarray, tuple[Tensor, ...]]] = []

    def add(self, owners: np.ndarray, picked: tuple[Tensor, ...]) -> list[int]:
        """Add the tokens of one step. Returns the unfinished rows."""
        rows = np.flatnonzero(~self.over[owners])
        going, tokens = owners[rows], picked[0].cpu().numpy()[rows]
        self.steps.append((rows.tolist(), going, picked))
        self.ended[going] = (tokens[:, None] == self.ends).any(1)
        if self.stop:
            self._stop(self.stop, going, tokens)
        self.over[going] = self.ended[going] | (self.budgets[going] <= len(self.steps))
        return rows[~self.over[going]].tolist()

    def _stop(self, stop: StopTexts, going: np.ndarray, tokens: np.ndarray) -> None:
        """End the rows in which a stop text has ended."""
        for owner, token in zip(going.tolist(), tokens.tolist(), strict=True):
            self.tokens[owner].append(token)
            beyond = None if self.ended[owner] else stop.beyond(self.tokens[owner])
            if beyond is not None:
                self.ended[owner], self.beyond[owner] = True, beyond

    def turns(self, version: int) -> list[Turn]:
        owners = np.concatenate([owners for _, owners, _ in self.steps])
        order = np.argsort(owners, kind="stable")
        cuts = np.cumsum(np.bincount(owners, minlength=len(self.over)))[:-1]
        columns = [
            np.split(
                torch.cat([picked[c][rows] for rows, _, picked in self.steps]).cpu().numpy()[order], cuts
            )
            for c in range(len(self.steps[0][2]))
        ]
        behaviour = (
            list(zip(columns[3], columns[4], strict=True)) if len(columns) > 3 else [None] * len(self.over)
        )
        fields = zip(*columns[:3], behaviour, self.ended.tolist(), self.beyond, strict=True)
        return [
            Turn(
                ids.tolist(),
                logp_T,
                raw_T,
                behaviour_TK,
                np.full(len(ids), version),
                "stop" if ended else "length",
                beyond,
            )
            for ids, logp_T, raw_T, behaviour_TK, ended, beyond in fields
        ]


class _Rows:
    """The unfinished rows: their requests, noise keys and steps."""

    def __init__(self, model: Model, asks: Sequence[TurnRequest], decoder: CpuDecoder | None):
        self.model, self.asks = model, asks
        # the index of the request that each row of the batch belongs to
        self.owners = np.arange(len(asks))
        self.keys_B = torch.tensor([ask.rng_key for ask in asks], dtype=torch.int64, device=model.device)
        self.steps = token_steps(model, decoder, max(ask.max_tokens for ask in asks))

    def read_prompts(self) -> Tensor:
        width = max(len(ask.ids) for ask in self.asks)
        ids_BP, mask_BP = torch.zeros(2, len(self.asks), width, dtype=torch.int64)
        for row, ask in enumerate(self.asks):
            ids_BP[row, width - len(ask.ids) :] = torch.tensor(ask.ids)
            mask_BP[row, width - len(ask.ids) :] = 1
        device = self.model.device
        return self.model.head.logits(self.steps.begin(ids_BP.to(device), mask_BP.to(device)))

    def advance(self, tokens_B: Tensor) -> Tensor:
        return self.model.head.logits(self.steps.step(tokens_B))

    def keep(self, rows: list[int]) -> Tensor:
        """Drop the other rows. Returns the index that selects the kept rows from an earlier tensor."""
        index = torch.tensor(rows, device=self.model.device)
        self.owners, self.keys_B = self.owners[rows], self.keys_B[index]
        self.steps.keep(index)
        return index


def _pick(
    logits_BV: Tensor, keys_B: Tensor, position: int, draw: SamplingParams, behaviour_k: int
) -> tuple[Tensor, ...]:
    """(tokens_B, logp_B, raw_B[, behaviour ids_BK, behaviour logp_BK]). Temperature 0 takes the most likely
    token, and its logp is the raw one.
    """
    raw_BV = logits_BV.float().log_softmax(-1)
    logp_BV = _tempered(raw_BV, draw)
    if draw.temperature == 0:
        tokens_B = raw_BV.argmax(-1)
    else:
        position_B = torch.full_like(keys_B, position)
        tokens_B = (logp_BV + gumbel(keys_B, position_B, raw_BV.shape[-1])).argmax(-1)
    chosen = tokens_B[:, None]
    picked = (tokens_B, logp_BV.gather(-1, chosen)[:, 0], raw_BV.gather(-1, chosen)[:, 0])
    if behaviour_k:
        behaviour = raw_BV.topk(min(behaviour_k, raw_BV.shape[-1]))
        picked += (behaviour.indices, behaviour.values)
    return picked


def _tempered(raw_BV: Tensor, draw: SamplingParams) -> Tensor:
    """Log-probs at the sampling temperature, cut to the smallest set of tokens with a mass of at least
    top_p, and renormalised.
    """
    if draw.temperature in (0, 1) and draw.top_p == 1:
        return raw_BV
    logp_BV = (raw_BV / draw.temperature).log_softmax(-1) if draw.temperature not in (0, 1) else raw_BV
    if draw.top_p < 1:
        ordered = logp_BV.sort(descending=True)
        # Sums of whole numbers are exact, so they do not depend on the order in which a GPU adds.
        shares_BV = (ordered.values.exp() * _WHOLE).to(torch.int64)
        before_BV = shares_BV.cumsum(-1) - shares_BV
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(
            -1, ordered.indices, before_BV >= round(draw.top_p * _WHOLE)
        )
        logp_BV = logp_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(-1)
    return logp_BV
