"""An output head, which maps hidden states to logits over the real vocabulary, with the scaling and soft
cap of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reflux.kernels import products
from reflux.kernels.budget import chunk_rows

# the keys of model configs by which logits are multiplied, and those by which they are divided
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# the keys of model configs that hold the soft cap of the logits
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def scale_and_cap(config: Any) -> tuple[float, float | None]:
    """The factor on the logits and their soft cap, from the config of a text model; None: no cap."""
    scale = 1.0
    for name in FACTORS:
        scale *= float(getattr(config, name, None) or 1.0)
    for name in DIVISORS:
        scale /= float(getattr(config, name, None) or 1.0)
    caps = (getattr(config, name, None) for name in SOFT_CAPS)
    return scale, next((cap for cap in caps if cap), None)


class Bare:
    """A head that is only a matrix with an optional bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = weight, bias


class Head:
    """`head.logits(h_NH)` gives logits_NV. Rows of the weight beyond the tokenizer's vocabulary are padding
    and are cut off.

    `raw` is only the product; `finish` scales and caps it. The scalings of final logits in transformers are
    supported: Cohere multiplies by logit_scale, Granite divides by logits_scaling, and Gemma has a smooth
    cap at final_logit_softcapping. Other families have the same under the other names below.
    """

    def __init__(
        self,
        find: Callable[[], nn.Module | Bare],
        vocabulary: int,
        scale: float = 1.0,
        cap: float | None = None,
    ):
        self.find, self.vocabulary, self.scale, self.cap = find, vocabulary, scale, cap

    @classmethod
    def of_net(cls, net: Any, vocabulary: int) -> Head:
        """The head of a transformers model. vocabulary: the number of real tokens. The head's module is
        looked up at each use, because adapters may replace it.
        """
        scale, cap = scale_and_cap(net.config.get_text_config())
        return cls(net.get_output_embeddings, vocabulary, scale, cap)

    @classmethod
    def of(
        cls, weight_VH: Tensor, bias_V: Tensor | None = None, scale: float = 1.0, cap: float | None = None
    ) -> Head:
        """A head from a weight matrix, for `linear_divergence`. scale: a factor on the logits. cap: the soft
        cap of the logits; None: no cap.
        """
        bare = Bare(weight_VH, bias_V)
        return cls(lambda: bare, len(weight_VH), scale, cap)

    @property
    def module(self) -> nn.Module | Bare:
        return self.find()

    @property
    def matrix(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias over the real vocabulary. None for a head with an adapter and for a quantised
        head.
        """
        module = self.module
        if not isinstance(module, Bare) and type(module) is not nn.Linear:
            return None
        bias_V = None if module.bias is None else module.bias[: self.vocabulary]
        return module.weight[: self.vocabulary], bias_V

    @property
    def device(self) -> torch.device:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.device

    def raw(self, h_NH: Tensor) -> Tensor:
        """Only the product of hidden states and matrix, in the head's dtype; differentiable."""
        matrix = self.matrix
        if matrix is None:
            module = self.module
            assert isinstance(module, nn.Module)
            return module(h_NH)[..., : self.vocabulary]
        weight_VH, bias_V = matrix
        h_NH = h_NH.to(weight_VH.device, weight_VH.dtype)
        if torch.is_grad_enabled() or h_NH.ndim != 2:
            return nn.functional.linear(h_NH, weight_VH, bias_V)
        raw_NV = products.scores(h_NH, weight_VH)
        return raw_NV if bias_V is None else raw_NV.add_(bias_V)

    def finish(self, raw_NV: Tensor) -> Tensor:
        """The logits: `raw` outputs with the model's scaling and soft cap applied."""
        scaled_NV = raw_NV if self.scale == 1.0 else raw_NV * self.scale
        return torch.tanh(scaled_NV / self.cap) * self.cap if self.cap else scaled_NV

    def logits(self, h_NH: Tensor) -> Tensor:
        return self.finish(self.raw(h_NH))

    def logp_of(self, h_NH: Tensor, ids_N: Tensor) -> Tensor:
        """logp_N of given tokens, nats, float32, in row chunks; no gradient."""
        return self.logp_at(h_NH, ids_N[:, None])[:, 0]

    @torch.no_grad()
    def logp_at(self, h_NH: Tensor, ids_NK: Tensor) -> Tensor:
        """logp_NK at K given ids per row, nats, float32, in row chunks; no gradient."""
        rows = chunk_rows(self.vocabulary, h_NH.device)
        # A model that is spread over several devices may have its head on another one than the states.
        pairs = zip(h_NH.split(rows), ids_NK.to(self.device).split(rows), strict=True)
        return torch.cat([self.logits(h).float().log_softmax(-1).gather(-1, ids) for h, ids in pairs])


@torch.no_grad()
def kl_of(head: Head, h_NH: Tensor, other: Head, g_NG: Tensor) -> Tensor:
    """KL(softmax of the logits of `head` for h_NH || that of `other` for g_NG), nats [N], float32, in row
    chunks; no gradient.
    """
    rows, columns = chunk_rows(head.vocabulary, head.device), []
    for h, g in zip(h_NH.split(rows), g_NG.split(rows), strict=True):
        logp_NV = head.logits(h.to(head.device)).float().log_softmax(-1)
        logq_NV = other.logits(g.to(other.device)).float().log_softmax(-1).to(logp_NV.device)
        cost_NV = logp_NV.exp() * (logp_NV - logq_NV)
        # A token of probability 0 costs 0, also where the product is 0 * inf.
        columns.append(cost_NV.where(logp_NV > -torch.inf, 0.0).sum(-1))
    return torch.cat(columns)
