"""Batched decoding with a key-value cache: contexts in, turns out. Rows that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reflux.models import Model
from reflux.samplers.cache import roomy_cache
from reflux.samplers.noise import gumbel
from reflux.types import Draw

_CROWDED = 0.85  # dropping finished rows copies the cache, so it is done once this share or less still writes
_STOP_TOKENS = 64  # the last so many tokens are decoded to look for a stop string


@dataclass
class Turn:
    """One assistant turn as it was sampled. The end token, where there is one, is the last of `tokens`."""

    tokens: list[int]
    logp_T: np.ndarray  # under the distribution sampled from
    raw_T: np.ndarray  # at temperature 1
    said_TK: tuple[np.ndarray, np.ndarray] | None  # ids and log-probs
    ended: bool


@dataclass
class Ask:
    """One row to decode."""

    ids: list[int]
    key: int  # noise.row_key
    budget: int  # tokens it may write


@torch.inference_mode()
def decode(model: Model, asks: Sequence[Ask], draw: Draw, said_k: int) -> list[Turn]:
    """Sample one turn per row. Left padding; a row stops when it ends, is cut by its budget, or its text ends with a stop string."""
    rows, written = _Rows(model, asks), _Written(model, asks, draw)
    logits_BV = rows.read_prompts()
    position = 0
    while True:
        picked = _pick(logits_BV, rows.keys_B, position, draw, said_k)
        going = written.add(rows.owners, picked)
        position += 1
        if not going:
            return written.turns()
        tokens_B = picked[0]
        if len(going) <= _CROWDED * len(rows.owners):
            tokens_B = tokens_B[rows.keep(going)]
        logits_BV = rows.advance(tokens_B)


class _Written:
    """What the rows have said so far. Tensors of a step are looked at once, at the end; only the tokens are needed on the way."""

    def __init__(self, model: Model, asks: Sequence[Ask], draw: Draw):
        self.model, self.draw, self.asks = model, draw, asks
        self.tokens: list[list[int]] = [[] for _ in asks]
        self.over, self.ended = [False] * len(asks), [False] * len(asks)
        self.steps: list[tuple[list[int], list[int], tuple[Tensor, ...]]] = []  # rows still going, whose they are, what was picked

    def add(self, owners: list[int], picked: tuple[Tensor, ...]) -> list[int]:
        """Take a step's tokens; gives the rows that go on."""
        rows = [row for row, owner in enumerate(owners) if not self.over[owner]]
        self.steps.append((rows, [owners[row] for row in rows], picked))
        tokens = picked[0].tolist()
        for row in rows:
            self._put(owners[row], tokens[row])
        return [row for row in rows if not self.over[owners[row]]]

    def _put(self, owner: int, token: int) -> None:
        tokens = self.tokens[owner]
        tokens.append(token)
        self.ended[owner] = token in self.model.end_ids or self._stopped(tokens)
        self.over[owner] = self.ended[owner] or len(tokens) >= self.asks[owner].budget

    def _stopped(self, tokens: list[int]) -> bool:
        if not self.draw.stop:
            return False
        return self.model.tokenizer.decode(tokens[-_STOP_TOKENS:], skip_special_tokens=True).endswith(self.draw.stop)

    def turns(self) -> list[Turn]:
        owners = np.concatenate([np.asarray(owners) for _, owners, _ in self.steps])
        order = np.argsort(owners, kind="stable")
        cuts = np.cumsum(np.bincount(owners, minlength=len(self.asks)))[:-1]
        columns = [
            np.split(torch.cat([picked[c][rows] for rows, _, picked in self.steps]).cpu().numpy()[order], cuts)
            for c in range(1, len(self.steps[0][2]))
        ]
        said = list(zip(columns[2], columns[3], strict=True)) if len(columns) > 2 else [None] * len(self.asks)
        return [Turn(*fields) for fields in zip(self.tokens, columns[0], columns[1], said, self.ended, strict=True)]


class _Rows:
    """The rows still being written: cache, attention mask and noise keys."""

    def __init__(self, model: Model, asks: Sequence[Ask]):
        self.model = model
        device = model.device
        self.owners = list(range(len(asks)))  # which ask each row of the batch answers
        self.width = max(len(ask.ids) for ask in asks)
        longest = self.width + max(ask.budget for ask in asks)
        self.ids_BP = torch.zeros(len(asks), self.width, dtype=torch.int64)
        self.mask_BL = torch.zeros(len(asks), longest, dtype=torch.int64)
        for row, ask in enumerate(asks):
            self.ids_BP[row, self.width - len(ask.ids) :] = torch.tensor(ask.ids)
            self.mask_BL[row, self.width - len(ask.ids) :] = 1
        self.mask_BL = self.mask_BL.to(device)
        self.keys_B = torch.tensor([ask.key for ask in asks], dtype=torch.int64, device=device)
        self.place_B = torch.tensor([len(ask.ids) for ask in asks], device=device)
        self.cache = roomy_cache(model.net.config, max(ask.budget for ask in asks))

    def read_prompts(self) -> Tensor:
        mask_BP = self.mask_BL[:, : self.width]
        positions_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
        return self._forward(self.ids_BP.to(self.model.device), mask_BP, positions_BP)

    def advance(self, tokens_B: Tensor) -> Tensor:
        self.width += 1
        mask_BL = self.mask_BL[:, : self.width]
        if self.model.plain_attention:
            mask_BL = mask_BL[:, None, None].bool()  # one new token sees all that came before: no mask has to be worked out
        logits_BV = self._forward(tokens_B[:, None], mask_BL, self.place_B[:, None])
        self.place_B = self.place_B + 1
        return logits_BV

    def _forward(self, ids_BL: Tensor, mask_BL: Tensor, positions_BL: Tensor) -> Tensor:
        states_BLH = self.model.trunk(
            input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_BL, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        return self.model.head.logits(states_BLH[:, -1])

    def keep(self, rows: list[int]) -> Tensor:
        """Drop the other rows; gives the index that selects the kept ones from a tensor of before."""
        index = torch.tensor(rows, device=self.model.device)
        self.owners = [self.owners[row] for row in rows]
        self.cache.batch_select_indices(index)
        self.mask_BL, self.keys_B, self.place_B = self.mask_BL[index], self.keys_B[index], self.place_B[index]
        return index


def _pick(logits_BV: Tensor, keys_B: Tensor, position: int, draw: Draw, said_k: int) -> tuple[Tensor, ...]:
    """(tokens_B, logp_B, raw_B[, said ids_BK, said logp_BK]). Temperature 0 takes the likeliest token, and its logp is the raw one."""
    raw_BV = logits_BV.float().log_softmax(-1)
    logp_BV = _tempered(raw_BV, draw)
    if draw.temperature == 0:
        tokens_B = raw_BV.argmax(-1)
    else:
        position_B = torch.full_like(keys_B, position)
        tokens_B = (logp_BV + gumbel(keys_B, position_B, raw_BV.shape[-1])).argmax(-1)
    chosen = tokens_B[:, None]
    picked = (tokens_B, logp_BV.gather(-1, chosen)[:, 0], raw_BV.gather(-1, chosen)[:, 0])
    if said_k:
        said = raw_BV.topk(min(said_k, raw_BV.shape[-1]))
        picked += (said.indices, said.values)
    return picked


def _tempered(raw_BV: Tensor, draw: Draw) -> Tensor:
    """Log-probs at the draw's temperature, cut to the smallest set that holds top_p, renormalised."""
    if draw.temperature in (0, 1) and draw.top_p == 1:
        return raw_BV
    logp_BV = (raw_BV / draw.temperature).log_softmax(-1) if draw.temperature not in (0, 1) else raw_BV
    if draw.top_p < 1:
        ordered = logp_BV.sort(descending=True)
        before_BV = ordered.values.exp().cumsum(-1) - ordered.values.exp()
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, ordered.indices, before_BV >= draw.top_p)
        logp_BV = logp_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(-1)
    return logp_BV
