"""How several texts are laid out for one forward pass: as rows padded on the right, or packed, one after the
other in one row without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TextRows:
    """The arguments of one forward pass of a trunk (a model without its output head).

    ids_BL: token ids. starts: for each text the index of its first token among all B * L positions.
    arguments: what the pass takes besides the ids.
    """

    ids_BL: Tensor
    starts: list[int]
    arguments: Mapping[str, Any]

    def states(self, trunk: Any, cache: Any = None) -> Tensor:
        """h_NH: the hidden states at all N = B * L positions, those of padding included. cache: an empty
        cache of transformers that gets their keys and values.
        """
        kept = {} if cache is None else {"past_key_values": cache}
        read = trunk(input_ids=self.ids_BL, use_cache=bool(kept), **kept, **self.arguments)
        return read.last_hidden_state.flatten(0, 1)


def padded(texts: Sequence[np.ndarray], device: torch.device, pad_id: int = 0) -> TextRows:
    """One row per text. No mask is needed, because padding comes after all real tokens and attention is
    causal.
    """
    width = max(len(text) for text in texts)
    ids_BL = np.full((len(texts), width), pad_id, dtype=np.int64)
    for row, text in zip(ids_BL, texts, strict=True):
        row[: len(text)] = text
    return TextRows(torch.from_numpy(ids_BL).to(device), [b * width for b in range(len(texts))], {})


def packed(texts: Sequence[np.ndarray], device: torch.device) -> TextRows:
    """All texts in one row. Each has positions of its own, and `models.packed_attention` keeps it from the
    others; its arguments have the names that transformers gives them.
    """
    lengths = np.array([len(text) for text in texts])
    ends = np.concatenate([[0], lengths.cumsum()])
    positions_N = np.concatenate([np.arange(length) for length in lengths])
    bounds = torch.from_numpy(ends.astype(np.int32)).to(device)
    longest = int(lengths.max())
    arguments = {
        "position_ids": torch.from_numpy(positions_N).to(device)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    ids_1N = torch.from_numpy(np.concatenate(texts).astype(np.int64)).to(device)[None]
    return TextRows(ids_1N, ends[:-1].tolist(), arguments)
