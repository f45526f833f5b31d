"""Attention within each of several texts that lie one after the other in one row, through the attention
interface of transformers. On a GPU it is torch's variable-length attention; on a CPU each text is computed
alone, and only the other layers read all texts at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reflux.models.text import Model, first_line
from reflux.models.text_rows import packed, padded

NAME = "reflux_packed"
# lengths of the texts of the trial
_TRIAL = (3, 14, 9)
# tolerated differences of hidden states as shares of their norm, for rounding
_CLOSE, _CLOSE_IN_16_BITS = 1e-4, 0.05
# the width of hidden states from which a CPU reads packed rows
_WIDE = 256


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    use_cache: bool = False,
    output_attentions: bool = False,
) -> tuple[Tensor, None]:
    """Causal attention of each text to itself. query, key, value: [1, heads, N, D]. cu_seq_lens_q: the N at
    which each text begins, and the end of the last one. The result is [1, N, heads, D].

    The other arguments are those that models pass to every attention. An attention that computes something
    else, such as capped scores, gets more arguments, and the call fails.
    """
    if cu_seq_lens_q is None or sliding_window is not None or dropout:
        raise NotImplementedError("it passes its attention no bounds of texts, a window or dropout")
    if query.device.type == "cpu":
        return _text_by_text(query, key, value, scaling, cu_seq_lens_q.tolist()), None
    return _by_kernel(query, key, value, scaling, cu_seq_lens_q, max_length_q), None


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, bounds: Tensor, longest: int
) -> Tensor:
    """torch's kernel takes [N, heads, D] in 16 bits, and values as wide as the keys."""
    from torch.nn.attention.varlen import varlen_attn

    device, missing = query.device.type, key.shape[-1] - value.shape[-1]
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    value = F.pad(value, (0, missing)) if missing else value
    q_NAD, k_NBD, v_NBD = (x[0].transpose(0, 1).to(half) for x in (query, key, value))
    shared = q_NAD.shape[1] != k_NBD.shape[1]
    # Without this argument, as in older versions of torch, the kernel takes shared heads unasked. In a
    # compiled layer `shared` is no plain truth value, which the argument must be.
    asks = shared and "enable_gqa" in signature(varlen_attn).parameters
    named: dict[str, Any] = {"enable_gqa": True} if asks else {}
    out_NAD = varlen_attn(
        q_NAD, k_NBD, v_NBD, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **named
    )
    assert isinstance(out_NAD, Tensor)
    return out_NAD[None, ..., : out_NAD.shape[-1] - missing].contiguous()


def _text_by_text(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, bounds: list[int]
) -> Tensor:
    shared, texts = query.shape[1] != key.shape[1], []
    for start, stop in pairwise(bounds):
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        texts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared))
    return torch.cat(texts, dim=2).transpose(1, 2).contiguous()


@contextmanager
def attending_packed(net: Any) -> Iterator[None]:
    """Within this context the model reads packed rows only. Recomputation of activations in a backward pass
    must happen in it too.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    before = net.config._attn_implementation
    net.set_attn_implementation(NAME)
    try:
        yield
    finally:
        net.set_attn_implementation(before)


def why_padded(model: Model, precision: AbstractContextManager[Any]) -> str:
    """Why this model reads padded rows; "" if it reads packed ones. precision: the context of its passes."""
    kind = model.device.type
    if kind not in ("cuda", "cpu"):
        return f"there is no variable-length attention for the device {kind!r}"
    if kind == "cpu" and model.net.get_input_embeddings().weight.shape[-1] < _WIDE:
        return "a small model takes little time for padding on a CPU"
    return trial(model, precision)


def trial(model: Model, precision: AbstractContextManager[Any]) -> str:
    """Why this model cannot read packed rows; "" if it can. It reads some texts packed and each alone."""
    if not model.plain_attention:
        return "it has other layers than full attention over rotary positions, computed by sdpa"
    texts = [np.arange(length, 2 * length) % model.vocabulary for length in _TRIAL]
    with torch.no_grad(), precision:
        alone_NH = torch.cat([padded([text], model.device).states(model.trunk) for text in texts])
        try:
            with attending_packed(model.net):
                together_NH = packed(texts, model.device).states(model.trunk)
        except (RuntimeError, TypeError, ValueError, ImportError) as error:
            return f"variable-length attention fails on it: {first_line(error)}"
    gap = float((together_NH - alone_NH).norm() / alone_NH.norm())
    exact = model.device.type == "cpu" and alone_NH.dtype in (torch.float32, torch.float64)
    bound = _CLOSE if exact else _CLOSE_IN_16_BITS
    return "" if gap < bound else f"packed texts and single texts differ (by {gap:.1g} of the norm)"
