"""What a language model in a GGUF file needs per token, from its header."""

from __future__ import annotations

from reflux.models.gguf_header import GgufHeader
from reflux.models.text_shape import TextShape, shape_of

# the names of settings and of parts of tensor names in a config.json and its weight files
_SETTINGS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_TENSORS = {
    "attn_q": "q_proj",
    "attn_q_norm": "q_norm",
    "ffn_gate": "gate_proj",
    "ffn_gate_exps": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_up_exps": "up_proj",
}


def shape_in(header: GgufHeader) -> TextShape | None:
    """The shape; None where the header has other settings."""
    config = {_SETTINGS[name]: value for name, value in header.settings.items() if name in _SETTINGS}
    if "hidden_size" in config:
        # The settings need not have the vocabulary, but the table of embeddings has a row for each token.
        config["vocab_size"] = header.counts.get("token_embd.weight", 0) // config["hidden_size"]
    parts = {part for name in header.counts for part in name.split(".")}
    return shape_of(config, [_TENSORS[part] for part in parts if part in _TENSORS])
