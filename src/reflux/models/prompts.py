"""Reads the prompts of a batch in chunks of a limited number of tokens, each different prompt once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reflux.models.text import Model

# tokens that the model reads at once, which limits the memory for their states
_TOKENS = 16384


@dataclass(frozen=True)
class Chunk:
    """What the model has read: row source_N[i] of it belongs to row target_N[i] of the batch."""

    # keys and values [B, heads, L, D] of all layers in turn
    states: list[Tensor]
    # the hidden states after the last token
    h_BH: Tensor
    source_N: Tensor
    target_N: Tensor

    def write(self, states: Sequence[Tensor], h_BH: Tensor, width: int) -> None:
        """Copy it to its rows of the batch, whose prompts end before column `width`."""
        h_BH[self.target_N] = self.h_BH[self.source_N]
        for state, new in zip(states, self.states, strict=True):
            state[self.target_N, :, width - new.shape[2] : width] = new[self.source_N]


class Prompts:
    """Prompts with ids on the device, padded on the left. Several rows may have the same prompt."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]]):
        self.model = model
        different = sorted(set(map(tuple, prompts)), key=len, reverse=True)
        place = {ids: number for number, ids in enumerate(different)}
        self.lengths, self.width = [len(ids) for ids in different], len(different[0])
        # of each row: its prompt among the different ones, and its length
        self.prompt_B = torch.tensor([place[tuple(ids)] for ids in prompts])
        self.length_B = torch.tensor([len(ids) for ids in prompts])
        ids_UP = pad_sequence(list(map(torch.tensor, different)), batch_first=True, padding_side="left")
        # All of them go to the device before the first is read, so no copy waits for a model call.
        self.ids_UP = ids_UP.to(model.device)

    def chunks(self) -> Iterator[Chunk]:
        """Read the prompts, the longest first."""
        start, device = 0, self.model.device
        while start < len(self.lengths):
            width = self.lengths[start]
            stop = min(len(self.lengths), start + max(1, _TOKENS // width))
            target_N = torch.nonzero((self.prompt_B >= start) & (self.prompt_B < stop))[:, 0]
            source_N = self.prompt_B[target_N] - start
            # No name here keeps what was read, so it is freed before the next prompts are read.
            yield Chunk(*self._read(start, stop, width), source_N.to(device), target_N.to(device))
            start = stop

    def _read(self, start: int, stop: int, width: int) -> tuple[list[Tensor], Tensor]:
        trunk, device = self.model.trunk, self.model.device
        cache: Any = DynamicCache(config=self.model.net.config)
        # Layers with a sliding window keep all positions too, as those of a static cache do.
        layers: list[Any] = [DynamicLayer() for _ in cache.layers]
        cache.layers = layers
        length_B = torch.tensor(self.lengths[start:stop], device=device)
        mask_BP = (torch.arange(width, device=device) >= width - length_B[:, None]).long()
        placed = {"position_ids": (mask_BP.cumsum(-1) - 1).clamp(min=0)}
        if "position_ids" not in inspect.signature(trunk.forward).parameters:
            placed = {}
        read = {"attention_mask": mask_BP, "use_cache": True, "past_key_values": cache, **placed}
        ids_BP = self.ids_UP[start:stop, self.width - width :]
        h_BH = trunk(input_ids=ids_BP, **read).last_hidden_state[:, -1]
        return [state for layer in layers for state in (layer.keys, layer.values)], h_BH
