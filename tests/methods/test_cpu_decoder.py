"""The short decode step: the model's own states for every family it knows, with padding, grouped heads and
dropped rows; else None.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from reflux.assets.characters import character_tokenizer
from reflux.config.step_context import SamplingParams
from reflux.kernels import merged
from reflux.models.cpu.decoder import CpuDecoder, cpu_decoder
from reflux.models.generate import decode
from reflux.models.text import Model, as_model
from reflux.models.turns import TurnRequest

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3 angles": {
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32},
    },
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "every head its own keys": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 8},
    "one key for all": {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 8},
}
OTHERS: dict[str, dict[str, Any]] = {
    "another family": {"model_type": "gemma2", "head_dim": 8},
    "a window": {"model_type": "mistral", "sliding_window": 16},
    "angles that depend on the length": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
    "another activation": {"model_type": "llama", "hidden_act": "gelu"},
}


def model(model_type: str, seed: int = 0, **more: Any) -> Model:
    """Random weights everywhere, biases and norms included, so that nothing is left out unseen."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    ends = {
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "vocab_size": len(character_tokenizer()),
    }
    config = AutoConfig.for_model(model_type, **(shape | ends | {"max_position_embeddings": 256} | more))
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=rng) * (0.3 if parameter.ndim > 1 else 0.5)
                + (parameter.ndim == 1)
            )
    return as_model(net, character_tokenizer())


def own_states(loaded: Model, ids: list[list[int]]) -> list[Tensor]:
    """The last state of each row, one row at a time, without cache or padding."""
    with torch.no_grad():
        return [
            loaded.trunk(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0, -1]
            for row in ids
        ]


def opened(loaded: Model) -> CpuDecoder:
    decoder = cpu_decoder(loaded)
    assert decoder is not None
    return decoder


@torch.no_grad()
def begun(loaded: Model, decoder: CpuDecoder, ids: list[list[int]], room: int) -> tuple[Any, Tensor]:
    """The memory of left-padded prompts, and the place of each row's next token."""
    width = max(map(len, ids))
    ids_BP = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask_BP = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    cache = DynamicCache(config=loaded.net.config)
    places_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
    loaded.trunk(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        position_ids=places_BP,
        past_key_values=cache,
        use_cache=True,
    )
    return decoder.begin(cache, mask_BP, room), torch.tensor([len(row) for row in ids])


@pytest.mark.parametrize("way", ["one matrix", "packed", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_give_the_models_own_states_with_padding_and_rows_dropped(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each of the three ways of a product. Steps 0 to 5 have at least half of the first rows."""
    if way != "one matrix":
        monkeypatch.setattr(merged, "_SMALL", 0)
        monkeypatch.setattr(merged, "_CALLS", 1 if way == "packed" else 99)
    loaded = model(**KINDS[kind])
    decoder = opened(loaded)
    rng = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 102, (length,), generator=rng).tolist() for length in (9, 1, 5, 7)]
    memory, place_B = begun(loaded, decoder, ids, room=8)
    for step in range(8):
        if step in (3, 6):
            kept = torch.tensor([0, 1, 3] if step == 3 else [2])
            memory.keep(kept)
            ids, place_B = [ids[row] for row in kept.tolist()], place_B[kept]
        tokens_B = torch.randint(2, 102, (len(ids),), generator=rng)
        ids = [[*row, token] for row, token in zip(ids, tokens_B.tolist(), strict=True)]
        with torch.no_grad():
            made_BH = decoder.step(memory, tokens_B, place_B)
        place_B = place_B + 1
        torch.testing.assert_close(made_BH, torch.stack(own_states(loaded, ids)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_it_does_not_know_it_leaves_alone(kind: str) -> None:
    assert cpu_decoder(model(**OTHERS[kind])) is None


def test_other_number_types_modules_and_attention_are_left_alone() -> None:
    loaded = model("llama")
    assert cpu_decoder(replace(loaded, plain_attention=False)) is None
    assert cpu_decoder(as_model(model("llama").net.to(torch.bfloat16), character_tokenizer())) is None

    class Linear(torch.nn.Linear):
        pass

    loaded.trunk.layers[1].mlp.up_proj = Linear(32, 48, bias=False)
    assert cpu_decoder(loaded) is None


def test_a_model_that_does_something_else_under_a_known_name_fails_the_trial() -> None:
    """Whatever a later transformers changes: here, a norm."""
    loaded = model("llama")
    norm = loaded.trunk.layers[2].post_attention_layernorm
    plain = norm.forward
    norm.forward = lambda x: plain(x) * 1.01
    assert cpu_decoder(loaded) is None


def test_a_trial_on_weights_of_zero_cannot_pass_for_another_activation() -> None:
    """A fresh model may have zero projections, which hide what stands before them until the first weights are
    published.
    """
    loaded = model("llama", hidden_act="gelu")
    with torch.no_grad():
        for layer in loaded.trunk.layers:
            layer.mlp.down_proj.weight.zero_()
    assert cpu_decoder(loaded) is None


def test_published_weights_count_from_the_next_step() -> None:
    loaded, other = model("qwen2"), model("qwen2", seed=5)
    decoder = opened(loaded)
    with torch.no_grad():
        for name, value in other.net.state_dict().items():
            loaded.net.state_dict()[name].copy_(value)
    ids = [[5, 6, 7], [9, 10]]
    memory, place_B = begun(loaded, decoder, ids, room=1)
    with torch.no_grad():
        made_BH = decoder.step(memory, torch.tensor([11, 12]), place_B)
    torch.testing.assert_close(
        made_BH, torch.stack(own_states(other, [[5, 6, 7, 11], [9, 10, 12]])), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_turns_are_those_of_the_long_way(kind: str) -> None:
    """Same tokens, same ends, same log-probs; unequal prompts and budgets, a stop text, and the student's own
    top-k.
    """
    loaded = model(**KINDS[kind])
    draw = SamplingParams(0, "train", 40, temperature=0.8, stop=("e", "a"))
    asks = [
        TurnRequest([5 + row, *range(6, 7 + row)], 4 + 3 * row, row * 7919, draw, top_k=3) for row in range(9)
    ]
    short, long = decode(loaded, asks, lambda: 0, opened(loaded)), decode(loaded, asks, lambda: 0)
    assert len({len(turn.tokens) for turn in long}) > 3
    assert {turn.finish for turn in long} == {"stop", "length"}
    for one, other in zip(short, long, strict=True):
        assert (one.tokens, one.finish) == (other.tokens, other.finish)
        torch.testing.assert_close(
            torch.from_numpy(one.logp_T), torch.from_numpy(other.logp_T), rtol=0, atol=2e-4
        )
        torch.testing.assert_close(
            torch.from_numpy(one.raw_T), torch.from_numpy(other.raw_T), rtol=0, atol=2e-4
        )
        assert one.behaviour_TK is not None
        assert other.behaviour_TK is not None
        assert one.behaviour_TK[0].tolist() == other.behaviour_TK[0].tolist()
