"""How a model reads the prompts of a batch, and then one more token per row.

`token_steps` chooses for a model: the library's decoder on the CPU, a cache of transformers, or no cache. All
three give the same hidden states up to rounding.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from reflux.models.cache_argument import cache_argument
from reflux.models.cpu.decoder import CpuDecoder, Memory
from reflux.models.kv_cache import roomy_cache
from reflux.models.packed_attention import attending_packed
from reflux.models.text import Model
from reflux.models.text_rows import packed


class TokenSteps(Protocol):
    def begin(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        """h_BH, the hidden states after the last prompt token. The prompts are padded on the left. mask_BP: 0
        on padding, else 1.
        """
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """h_BH after one more token per row."""
        ...

    def keep(self, index: Tensor) -> None:
        """Drop the rows that are not in `index`."""
        ...


def token_steps(model: Model, decoder: CpuDecoder | None, room: int) -> TokenSteps:
    """The steps of one batch. decoder: the decoder on the CPU, where the model has one. room: the most tokens
    that a row may still get.
    """
    if decoder:
        return DecoderSteps(model, decoder, room)
    argument = cache_argument(model)
    return CachedSteps(model, room, argument) if argument else UncachedSteps(model)


class CachedSteps:
    """A cache of transformers holds the state of the rows. argument: the name under which the trunk's forward
    pass takes it.
    """

    def __init__(self, model: Model, room: int, argument: str = "past_key_values"):
        self.model, self.room, self.argument = model, room, argument
        self.names = inspect.signature(model.trunk.forward).parameters
        self.cache = self._cache()

    def _cache(self) -> DynamicCache:
        return roomy_cache(self.model.net.config, self.room)

    def begin(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        self.mask_BL = F.pad(mask_BP, (0, self.room), value=1)
        self.width, self.place_B = mask_BP.shape[1], mask_BP.sum(-1)
        return self._forward(ids_BP, mask_BP, (mask_BP.cumsum(-1) - 1).clamp(min=0))

    def step(self, tokens_B: Tensor) -> Tensor:
        self.width += 1
        h_BH = self._forward(tokens_B[:, None], self._step_mask(), self.place_B[:, None])
        self.place_B = self.place_B + 1
        return h_BH

    def _step_mask(self) -> Tensor | None:
        if self.argument == "cache_params":
            # A state-space model multiplies its input by the mask, and the new tokens are no padding.
            return None
        mask_BL = self.mask_BL[:, : self.width]
        # One new token attends to all earlier tokens, so transformers need not build a causal mask.
        return mask_BL[:, None, None].bool() if self.model.plain_attention else mask_BL

    def _forward(self, ids_BL: Tensor, mask_BL: Tensor | None, positions_BL: Tensor) -> Tensor:
        # Models without position embeddings have no argument for positions.
        placed = {"position_ids": positions_BL} if "position_ids" in self.names else {}
        read = {"attention_mask": mask_BL, "use_cache": True, self.argument: self.cache, **placed}
        return self.model.trunk(input_ids=ids_BL, **read).last_hidden_state[:, -1]

    def keep(self, index: Tensor) -> None:
        self.cache.reorder_cache(index)  # pyright: ignore[reportArgumentType]
        self.mask_BL, self.place_B = self.mask_BL[index], self.place_B[index]


class DecoderSteps(CachedSteps):
    """The model reads the prompts; the library's decoder on the CPU computes the steps."""

    memory: Memory

    def __init__(self, model: Model, decoder: CpuDecoder, room: int):
        super().__init__(model, room)
        self.decoder = decoder

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.net.config)

    def begin(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        begin = self._begin_packed if self.decoder.packs else super().begin
        h_BH = begin(ids_BP, mask_BP)
        self.memory = self.decoder.begin(self.cache, mask_BP, self.room)
        return h_BH

    def _begin_packed(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        """The prompts are read without their padding, and the cache is then laid out with it."""
        real_BP, self.place_B = mask_BP.bool(), mask_BP.sum(-1)
        texts = [ids_P[real_P].numpy() for ids_P, real_P in zip(ids_BP, real_BP, strict=True)]
        with attending_packed(self.model.net):
            h_NH = packed(texts, ids_BP.device).states(self.model.trunk, self.cache)
        # The index of each token among all tokens. Padding is never attended to and may hold any token.
        index_BP = (mask_BP.flatten().cumsum(0) - 1).view_as(mask_BP) * mask_BP
        layers: Any = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = (x[0][:, index_BP].transpose(0, 1) for x in (layer.keys, layer.values))
        return h_NH[index_BP[:, -1]]

    def step(self, tokens_B: Tensor) -> Tensor:
        h_BH = self.decoder.step(self.memory, tokens_B, self.place_B)
        self.place_B = self.place_B + 1
        return h_BH

    def keep(self, index: Tensor) -> None:
        self.memory.keep(index)
        self.place_B = self.place_B[index]


class UncachedSteps:
    """The model reads the whole text of every row again for each token, padded on the right as the learner
    does it. The time grows with the square of the length.
    """

    def __init__(self, model: Model):
        self.model = model

    def begin(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        self.length_B = mask_BP.sum(-1)
        rows = zip(ids_BP, self.length_B.tolist(), strict=True)
        self.ids_BL = torch.stack(
            [F.pad(ids_P[len(ids_P) - length :], (0, len(ids_P) - length)) for ids_P, length in rows]
        )
        return self._forward()

    def step(self, tokens_B: Tensor) -> Tensor:
        self.ids_BL = F.pad(self.ids_BL, (0, 1)).scatter(1, self.length_B[:, None], tokens_B[:, None])
        self.length_B = self.length_B + 1
        return self._forward()

    def _forward(self) -> Tensor:
        h_BLH = self.model.trunk(input_ids=self.ids_BL, use_cache=False).last_hidden_state
        return h_BLH[torch.arange(len(h_BLH), device=h_BLH.device), self.length_B - 1]

    def keep(self, index: Tensor) -> None:
        self.ids_BL, self.length_B = self.ids_BL[index], self.length_B[index]
