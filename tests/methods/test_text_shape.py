"""The estimate of activations against what torch keeps for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from reflux.models.text_shape import TextShape, shape_of
from reflux.models.training_mode import quiet_dropout, recompute_activations

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
NETS: dict[str, Any] = {
    "llama": lambda layers: LlamaForCausalLM(
        LlamaConfig(hidden_size=96, intermediate_size=256, vocab_size=64, num_hidden_layers=layers, **HEADS)
    ),
    "qwen3": lambda layers: Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=96,
            intermediate_size=288,
            head_dim=48,
            vocab_size=64,
            num_hidden_layers=layers,
            **HEADS,
        )
    ),
    "gpt2": lambda layers: GPT2LMHeadModel(
        GPT2Config(
            n_embd=96,
            n_head=4,
            vocab_size=64,
            n_layer=layers,
            eos_token_id=1,
            bos_token_id=1,
            n_positions=256,
        )
    ),
}


def kept_bytes(net: Any, tokens: int, narrow: bool) -> int:
    """Bytes of the tensors that a forward pass keeps, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # held, so that no other tensor gets the same address
            held.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(tokens)[None] % 64
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=narrow),
    ):
        net.base_model(input_ids=ids, use_cache=False)
    return sum(kept.values())


def shape(net: Any) -> TextShape:
    found = shape_of(net.config.to_dict(), net.state_dict())
    assert found is not None
    return found


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_the_estimate_is_near_what_torch_keeps(name: str, narrow: bool) -> None:
    """Copies of weights in 16 bits do not depend on the tokens, so two lengths are compared."""
    net = NETS[name](3)
    quiet_dropout(net)
    measured = (kept_bytes(net, 192, narrow) - kept_bytes(net, 64, narrow)) / 128
    assert shape(net).activation_bytes(narrow, recomputed=False) == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize("name", NETS)
def test_checkpointing_keeps_the_inputs_of_layers(name: str) -> None:
    """A layer's input is one hidden state in float32; the estimate adds all of one layer."""
    shapes = [shape(NETS[name](layers)) for layers in (2, 6)]
    few, many = (shape.activation_bytes(narrow=False, recomputed=True) for shape in shapes)
    assert many - few == 4 * 4 * 96
    net = NETS[name](6)
    quiet_dropout(net)
    recompute_activations(net)
    measured = (kept_bytes(net, 192, False) - kept_bytes(net, 64, False)) / 128
    assert measured == pytest.approx(6 * 4 * 96, rel=0.5)


def test_the_cache_holds_keys_and_values_of_every_layer() -> None:
    from transformers import DynamicCache

    net = NETS["qwen3"](3)
    cache = DynamicCache(config=net.config)
    with torch.no_grad():
        net(input_ids=torch.arange(10)[None], past_key_values=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert shape(net).cache_bytes(4) == held * 4 / 10


def test_a_config_without_layers_has_no_shape() -> None:
    assert shape_of({"hidden_size": 8}, ()) is None
