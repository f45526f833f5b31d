"""One more token per row: each way gives the hidden states of the model's own pass over the whole text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tiny
from device import DEVICE, here
from reflux.assets.characters import character_tokenizer
from reflux.models import packed_attention
from reflux.models.cache_argument import cache_argument
from reflux.models.cpu.decoder import cpu_decoder
from reflux.models.text import Model, as_model
from reflux.models.token_steps import CachedSteps, DecoderSteps, UncachedSteps, token_steps

SIZE = len(character_tokenizer())
SMALL: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "eos_token_id": tiny.END,
    "pad_token_id": 0,
    "bos_token_id": None,
}
BARE = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id")}
LFM2 = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_auto_adjust_ff_dim": False}
MAMBA2 = {"state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
# by the kind of state that a model keeps
CONFIGS: dict[str, Callable[[], Any]] = {
    "keys and values": lambda: transformers.LlamaConfig(**SMALL),
    "convolution and attention": lambda: transformers.Lfm2Config(**SMALL, **LFM2),
    "state space": lambda: transformers.Mamba2Config(**BARE, **MAMBA2, initializer_range=0.2),
    "state space with a mask": lambda: transformers.MambaConfig(**BARE, state_size=8, initializer_range=0.2),
    "alibi": lambda: transformers.FalconConfig(**BARE, num_attention_heads=4, alibi=True),
    "a cache class of its own": lambda: transformers.RwkvConfig(**BARE, attention_hidden_size=32),
    "state in its modules": lambda: transformers.RecurrentGemmaConfig(
        **SMALL, attention_window_size=8, lru_width=32, block_types=["recurrent", "attention"]
    ),
}


def model(kind: str) -> Model:
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    return as_model(here(net), character_tokenizer())


def whole(model: Model, text: list[int]) -> Tensor:
    """h_H at the last token of one text, without a cache and without padding."""
    return model.trunk(input_ids=here([text]), use_cache=False).last_hidden_state[0, -1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_of_unequal_length_that_leave_at_different_times(kind: str) -> None:
    follow(model(kind))


def test_a_large_model_on_a_cpu_reads_the_prompts_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "_WIDE", 32)
    reads, own = [], packed_attention._text_by_text
    monkeypatch.setattr(packed_attention, "_text_by_text", lambda *given: reads.append(1) or own(*given))
    follow(model("keys and values"))
    assert bool(reads) == (DEVICE == "cpu")


@torch.no_grad()
def follow(made: Model) -> None:
    """Compare 20 steps of a batch with whole texts."""
    rng = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, SIZE, (length,), generator=rng).tolist() for length in (3, 12, 7, 1)]
    ids_BP, mask_BP = torch.zeros(2, 4, 12, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids_BP[row, 12 - len(text) :], mask_BP[row, 12 - len(text) :] = torch.tensor(text), 1
    steps = token_steps(made, cpu_decoder(made), room=20)
    h_BH = steps.begin(here(ids_BP), here(mask_BP))
    for position in range(20):
        expected_BH = torch.stack([whole(made, text) for text in texts])
        assert (h_BH - expected_BH).abs().max() < 1e-3 * expected_BH.abs().max()
        if position in (4, 11):
            rows = torch.tensor([row for row in range(len(texts)) if row != 1])
            steps.keep(here(rows))
            texts = [texts[row] for row in rows]
        tokens_B = torch.randint(2, SIZE, (len(texts),), generator=rng)
        texts = [[*text, int(token)] for text, token in zip(texts, tokens_B, strict=True)]
        h_BH = steps.step(here(tokens_B))


@pytest.mark.parametrize(
    ("kind", "argument", "steps"),
    [
        ("keys and values", "past_key_values", DecoderSteps if DEVICE == "cpu" else CachedSteps),
        ("convolution and attention", "past_key_values", CachedSteps),
        ("state space", "cache_params", CachedSteps),
        ("a cache class of its own", None, UncachedSteps),
        ("state in its modules", None, UncachedSteps),
    ],
)
def test_the_cache_is_the_one_that_the_model_reads(kind: str, argument: str | None, steps: type) -> None:
    made = model(kind)
    assert cache_argument(made) == argument
    assert type(token_steps(made, cpu_decoder(made), 4)) is steps
