"""An output head: hidden states -> logits over the real vocabulary, with the model's own scaling and soft cap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reflux.kernels.cpu_linear import linear


class Head:
    """`head.logits(h_NH)` gives logits_NV. Rows of the weight beyond the tokenizer's vocabulary are padding and are cut off.

    Covers the final-logit scalings found in transformers: Cohere multiplies by logit_scale, Granite divides by logits_scaling, Gemma
    caps smoothly at final_logit_softcapping.
    """

    def __init__(self, net: Any, vocabulary: int):
        config = net.config.get_text_config()
        self.net = net
        self.vocabulary = vocabulary
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)

    @property
    def module(self) -> nn.Module:
        return self.net.get_output_embeddings()

    def logits(self, h_NH: Tensor) -> Tensor:
        module = self.module
        if type(module) is nn.Linear:
            bias = None if module.bias is None else module.bias[: self.vocabulary]
            weight_VH = module.weight[: self.vocabulary]
            logits_NV = linear(h_NH.to(weight_VH.device, weight_VH.dtype), weight_VH, bias)
        else:  # an adapter on the head, or a quantised one
            logits_NV = module(h_NH)[..., : self.vocabulary]
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return torch.tanh(logits_NV / self.cap) * self.cap if self.cap else logits_NV

    def logp_of(self, h_NH: Tensor, ids_N: Tensor, chunk_rows: int) -> Tensor:
        """logp_N of given tokens, float32, in row chunks."""
        with torch.no_grad():
            parts = [
                self.logits(h).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
                for h, ids in zip(h_NH.split(chunk_rows), ids_N.split(chunk_rows), strict=True)
            ]
        return torch.cat(parts) if parts else torch.zeros(0, device=h_NH.device)
