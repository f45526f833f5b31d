"""The context window, and where rotary angles that depend on the length end it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import tiny
from device import here
from reflux.assets.characters import character_tokenizer
from reflux.config.step_context import SamplingParams
from reflux.errors import ModelError
from reflux.models.context_window import context_tokens
from reflux.models.generate import decode
from reflux.models.text import as_model
from reflux.models.turns import TurnRequest

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 24,
}


def phi() -> Any:
    return transformers.Phi3Config(
        vocab_size=len(character_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=256,
        original_max_position_embeddings=24,
        rope_parameters=LONG,
        eos_token_id=tiny.END,
        pad_token_id=0,
        bos_token_id=None,
    )


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, None),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": 64}, 64),
        ({"max_seq_len": 2048}, 2048),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 64),
        (
            {
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 16,
                "rope_scaling": {"type": "longrope"},
            },
            16,
        ),
        ({"max_position_embeddings": 256, "rope_parameters": LONG}, 24),
        ({"rope_parameters": {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}}, 24),
    ],
)
def test_the_limit_is_read_from_the_config(config: dict[str, Any], tokens: int | None) -> None:
    assert context_tokens(config) == tokens


@torch.no_grad()
def test_within_the_limit_no_log_prob_depends_on_later_tokens() -> None:
    torch.manual_seed(0)
    model = as_model(here(transformers.AutoModelForCausalLM.from_config(phi()).eval()), character_tokenizer())
    assert model.context_tokens == 24
    ask = TurnRequest(list(range(2, 22)), 5, 1, SamplingParams(0, "train", 5))
    with pytest.raises(ModelError, match="a text of up to 25 tokens was asked for"):
        decode(model, [ask], lambda: 0)
    ids = here(torch.arange(2, 34))[None]
    states = {
        length: model.trunk(input_ids=ids[:, :length]).last_hidden_state[0, :8] for length in (8, 24, 25)
    }
    assert torch.allclose(states[8], states[24], atol=1e-5)
    # One token beyond the limit changes the states of the first tokens.
    assert not torch.allclose(states[8], states[25], atol=1e-2)
