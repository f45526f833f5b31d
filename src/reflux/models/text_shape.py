"""The memory that a language model needs per token beside its weights, from its config.json alone.

The count of activations is that of the layers as transformers computes them: root-mean-square or layer norms,
attention by torch's fused kernel, a gated or a plain MLP. Tests compare it with what torch keeps for the
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# tables of the inner size that an MLP keeps; gelu_new is computed by five elementwise operations
_GATED, _PLAIN, _STEPWISE = 4.0, 2.0, 4.75
_STEPWISE_NAMES = ("gelu_new", "gelu_fast")


@dataclass(frozen=True)
class TextShape:
    """width: of a hidden state. queries, keys: numbers of one token's queries, and of its keys. inner: of the
    MLP. tables: tables [tokens, inner] that the MLP keeps. inputs: linear layers that read a norm's output,
    as long as it is in another precision than theirs. rms, normed: norms are root-mean-square norms; queries
    and keys have norms too.
    """

    width: int
    layers: int
    vocabulary: int
    queries: int
    keys: int
    inner: int
    tables: float
    inputs: int
    rms: bool
    normed: bool

    def activation_bytes(self, narrow: bool, recomputed: bool) -> int:
        """Bytes per token that a forward pass keeps for the backward pass. narrow: autocast computes products
        in 16 bits, from float32 weights. recomputed: gradient checkpointing, which keeps the input of each
        layer, and all of one layer.
        """
        item, width = (2 if narrow else 4), self.width
        norms = 2 * (8 if self.rms else 4) * width
        norms += (6 if narrow else 8) * (self.queries + self.keys) * self.normed
        read = item * width * self.inputs if narrow else 2 * item * width
        attention = item * (3 * self.queries + 2 * self.keys)
        layer = norms + read + attention + int(item * self.tables * self.inner)
        return 8 * width + (layer + self.layers * 4 * width if recomputed else self.layers * layer)

    def cache_bytes(self, item: int) -> int:
        """Bytes per token of a key-value cache whose numbers have `item` bytes."""
        return 2 * self.layers * self.keys * item


def shape_of(config: Mapping[str, Any], names: Iterable[str]) -> TextShape | None:
    """The shape; None where the config has other keys. config: of the text model. names: of its tensors."""
    width = _first(config, "hidden_size", "n_embd", "d_model")
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers")
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    if not (width and layers and heads):
        return None
    parts = {part for name in names for part in name.split(".")}
    gated, split = bool(parts & {"gate_proj", "gate_up_proj"}), "q_proj" in parts
    act = str(_first(config, "hidden_act", "activation_function"))
    each = _first(config, "head_dim") or width // heads
    inner = _first(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * width
    experts = _first(config, "num_experts_per_tok")
    if experts and (expert := _first(config, "moe_intermediate_size")):
        inner = experts * expert
    return TextShape(
        width=width,
        layers=layers,
        vocabulary=_first(config, "vocab_size") or 0,
        queries=heads * each,
        keys=(_first(config, "num_key_value_heads") or heads) * each,
        inner=inner,
        tables=_GATED if gated else _STEPWISE if act in _STEPWISE_NAMES else _PLAIN,
        inputs=(3 if split else 1) + (2 if "up_proj" in parts and gated else 1),
        rms="rms_norm_eps" in config,
        normed="q_norm" in parts,
    )


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key)), None)
