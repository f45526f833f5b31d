"""Gradient checkpointing and dropout on architectures that act differently in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import tiny
from reflux.assets.characters import character_tokenizer
from reflux.models.training_mode import quiet_dropout, recompute_activations

SIZE = len(character_tokenizer())
SMALL: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": tiny.END,
    "pad_token_id": 0,
    "bos_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "dropout as a number, layers left out": lambda: transformers.OPTConfig(
        **SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5, max_position_embeddings=64
    ),
    "noise in the router": lambda: transformers.MixtralConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.5
    ),
    "checkpoints in the trunk": lambda: transformers.BloomConfig(
        **SMALL, hidden_dropout=0.5, attention_dropout=0.5
    ),
}


def gradient(net: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(2, 26).reshape(2, 12)
    loss = net(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 5].sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpointing_computes_the_same_policy(kind: str) -> None:
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    other = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    other.load_state_dict(plain.state_dict())
    quiet_dropout(other)
    recompute_activations(other)
    calls: list[int] = []
    layer = next(module for name, module in other.named_modules() if name.endswith((".0.mlp", ".0.fc1")))
    layer.register_forward_pre_hook(lambda *known: calls.append(1))
    expected, found = gradient(plain), gradient(other)
    assert len(calls) == 2, "the layer was not computed again"
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
