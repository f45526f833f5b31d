"""Attention of one new token whose query heads share key-value heads, without copies of keys and values.

With a mask, transformers repeats each key-value head for all query heads that share it. For one token the
query heads of a group can stand where the positions of a text stand, because all of them see the same
columns: [B, K G, 1, D] is read as [B, K, G, D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# the name in transformers' registry of attention functions
_NAME = "sdpa_grouped"


def group_heads(net: Any) -> None:
    """Let a transformers model with "sdpa" attention use this function. Others stay as they are."""
    if net.config._attn_implementation == "sdpa" and net._can_set_attn_implementation():
        # Models pass keyword arguments of their own.
        AttentionInterface.register(_NAME, lambda module, *states, **how: _attention(module, states, how))
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        net.set_attn_implementation(_NAME)


def ungroup_heads(net: Any) -> None:
    if net.config._attn_implementation == _NAME:
        net.set_attn_implementation("sdpa")


def _attention(
    module: nn.Module, states: Sequence[Any], how: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """states: query [B, K G, L, D], key and value [B, K, M, D], mask [B, 1, L, M] or None. how: the keyword
    arguments of transformers' own function.
    """
    query, key, value, mask = states
    rows, heads, count, size = query.shape
    shared = key.shape[1] < heads and count == 1 and how.get("position_bias") is None
    if not shared or mask is None or mask.shape[1] > 1:
        return sdpa_attention_forward(module, query, key, value, mask, **how)
    grouped = query.reshape(rows, key.shape[1], -1, size)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=how.get("scaling"))
    return out.reshape(rows, 1, heads, -1), None
