"""Adapters on layers that are not plain matrices: the published weights are those of the adapted model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from device import here
from reflux.assets.characters import character_tokenizer
from reflux.models import lora
from reflux.models.settings import Lora
from reflux.models.text import Model, as_model, load_model

SIZE = len(character_tokenizer())
ENDS = {"eos_token_id": tiny.END, "bos_token_id": None, "pad_token_id": 0}


def experts() -> Any:
    """A mixture whose experts are one three-dimensional parameter per projection."""
    return transformers.Qwen3MoeConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        initializer_range=0.2,
        **ENDS,
    )


def narrow_experts() -> Any:
    """Mixtral, whose files hold each expert's matrices apart. Its experts are narrower than its states."""
    return transformers.MixtralConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.2,
        **ENDS,
    )


def transposed() -> Any:
    """GPT-2, whose matrices are stored transposed."""
    return transformers.GPT2Config(
        vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **ENDS
    )


def made(config: Any) -> Model:
    torch.manual_seed(0)
    return as_model(transformers.AutoModelForCausalLM.from_config(config).eval(), character_tokenizer())


@torch.no_grad()
def stirred(model: Model) -> None:
    """Give the adapters' second matrices random numbers, because they begin at zero."""
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.net.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.3, generator=rng)


@pytest.mark.parametrize("config", [experts, narrow_experts, transposed])
def test_published_and_exported_weights_are_those_of_the_adapted_model(
    config: Callable[[], Any], tmp_path: Path
) -> None:
    adapted, plain = made(config()), made(config())
    lora.attach(adapted, Lora(rank=2, alpha=8.0), seed=0)
    stirred(adapted)
    ids = torch.arange(3, 20)[None]
    lora.export(adapted, tmp_path)
    with torch.no_grad():
        before, expected = plain.net(input_ids=ids).logits, adapted.net(input_ids=ids).logits
        published = lora.merged(adapted.net)
        assert published.keys() == plain.net.state_dict().keys()
        plain.net.load_state_dict(published)
        loaded = load_model(str(tmp_path), "learner.model", dtype="float32")
        exported = loaded.net(input_ids=here(ids)).logits.cpu()
        assert (plain.net(input_ids=ids).logits - expected).abs().max() < 1e-3
        assert (exported - expected).abs().max() < 1e-3
        assert (before - expected).abs().max() > 0.1


def test_a_fraction_as_alpha_is_not_rounded() -> None:
    """alpha / rank * B A with alpha = 0.5 and rank = 2."""
    model = made(transposed())
    lora.attach(model, Lora(rank=2, alpha=0.5), seed=0)
    stirred(model)
    layer = model.net.transformer.h[0].attn.c_attn
    change = 0.25 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T
    base = layer.base_layer.weight
    published = lora.merged(model.net, {"transformer.h.0.attn.c_attn.weight"})
    torch.testing.assert_close(published["transformer.h.0.attn.c_attn.weight"], base + change)
    assert change.abs().max() > 0
