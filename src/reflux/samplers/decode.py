"""Batched decoding with a key-value cache: contexts in, turns out. Rows that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from reflux.models import Model
from reflux.samplers.noise import gumbel
from reflux.types import Draw


@dataclass
class Turn:
    """One assistant turn as it was sampled. The end token, where there is one, is the last of `tokens`."""

    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)  # under the distribution sampled from
    logp_raw: list[float] = field(default_factory=list)  # at temperature 1
    said_ids: list[list[int]] = field(default_factory=list)
    said_logp: list[list[float]] = field(default_factory=list)
    ended: bool = False


@dataclass
class Ask:
    """One row to decode."""

    ids: list[int]
    key: int  # noise.row_key
    budget: int  # tokens it may write


@torch.inference_mode()
def decode(model: Model, asks: Sequence[Ask], draw: Draw, said_k: int) -> list[Turn]:
    """Sample one turn per row. Left padding; a row leaves when it ends, is cut by its budget, or its text ends with a stop string."""
    turns = [Turn() for _ in asks]
    state = _Rows(model, asks)
    position = 0
    logits_BV = state.read_prompts()
    while state.alive:
        picked = _pick(logits_BV, state.keys_B, position, draw, said_k)
        _write(turns, state.alive, picked)
        position += 1
        going = [row for row, i in enumerate(state.alive) if not _over(model, turns[i], asks[i], draw)]
        if not going:
            break
        tokens_B = picked[0]
        if len(going) < len(state.alive):
            tokens_B = tokens_B[state.keep(going)]
        logits_BV = state.advance(tokens_B)
    return turns


class _Rows:
    """The rows still being written: cache, attention mask and noise keys."""

    def __init__(self, model: Model, asks: Sequence[Ask]):
        self.model = model
        device = model.device
        self.alive = list(range(len(asks)))
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
        self.cache = DynamicCache(config=model.net.config)

    def read_prompts(self) -> Tensor:
        mask_BP = self.mask_BL[:, : self.width]
        positions_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
        return self._forward(self.ids_BP.to(self.model.device), mask_BP, positions_BP)

    def advance(self, tokens_B: Tensor) -> Tensor:
        self.width += 1
        logits_BV = self._forward(tokens_B[:, None], self.mask_BL[:, : self.width], self.place_B[:, None])
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
        self.alive = [self.alive[row] for row in rows]
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


def _write(turns: list[Turn], alive: list[int], picked: tuple[Tensor, ...]) -> None:
    columns = [column.tolist() for column in picked]
    for row, i in enumerate(alive):
        turn = turns[i]
        turn.tokens.append(columns[0][row])
        turn.logp.append(columns[1][row])
        turn.logp_raw.append(columns[2][row])
        if len(columns) > 3:
            turn.said_ids.append(columns[3][row])
            turn.said_logp.append(columns[4][row])


def _over(model: Model, turn: Turn, ask: Ask, draw: Draw) -> bool:
    stopped = bool(draw.stop) and model.tokenizer.decode(turn.tokens[-64:], skip_special_tokens=True).endswith(draw.stop)
    turn.ended = stopped or turn.tokens[-1] in model.end_ids
    return turn.ended or len(turn.tokens) >= ask.budget
