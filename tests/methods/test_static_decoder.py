"""Decoding over a static cache: the turns of one token at a time, and the model's own log-probs. On a CPU the
same steps run without a graph.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from device import DEVICE
from reflux.assets.characters import character_tokenizer
from reflux.config.step_context import SamplingParams
from reflux.models import bucket, grouped_attention, prompts, static_decoder, static_rows
from reflux.models.generate import decode
from reflux.models.sampling_way import Way
from reflux.models.sampling_way import static_decoder as open_decoder
from reflux.models.static_decoder import StaticDecoder
from reflux.models.text import Model, as_model
from reflux.models.turns import Turn, TurnRequest

# nats, in float32
BOUND = 1e-5
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "windows in some layers": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": WINDOWED,
    },
    "windows in all layers": {"model_type": "mistral", "sliding_window": 8},
    "a table of positions": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2},
    "experts": {"model_type": "mixtral", "num_local_experts": 4},
    "fused projections": {"model_type": "phi3"},
    "alibi": {"model_type": "bloom", "n_head": 4},
    "attention sinks": {"model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 8},
}
DRAW = SamplingParams(0, "train", 60)


def model(model_type: str, seed: int = 0, **more: Any) -> Model:
    """Random weights with some nats of entropy, in which every parameter counts."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    sizes = {"num_key_value_heads": 2, "vocab_size": len(character_tokenizer())}
    given = shape | ends | sizes | {"max_position_embeddings": 256} | more
    torch.manual_seed(seed)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given)).float().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.15 if parameter.ndim > 1 else 0.3))
    return as_model(net.to(DEVICE), character_tokenizer())


def opened(loaded: Model) -> StaticDecoder:
    decoder = open_decoder(loaded)
    assert isinstance(decoder, StaticDecoder), decoder
    return decoder


def asked(
    loaded: Model, count: int = 9, draw: SamplingParams = DRAW, top_k: int = 0, most: int = 60
) -> list[TurnRequest]:
    """Prompts of 1 to 40 tokens, some of them equal, and budgets from 1."""
    dice = torch.Generator().manual_seed(7)
    lengths = [(1, 40, 12, 12, 25, 3, 18, 9, 30)[row % 9] for row in range(count)]
    texts = [torch.randint(2, 100, (length,), generator=dice).tolist() for length in lengths]
    texts[2 % count] = texts[3 % count]
    budgets = [1 + (row * 17) % most for row in range(count)]
    return [
        TurnRequest(ids, budget, 7919 * row + 5, draw, top_k)
        for row, (ids, budget) in enumerate(zip(texts, budgets, strict=True))
    ]


@torch.no_grad()
def own_logp(loaded: Model, ask: TurnRequest, turn: Turn) -> np.ndarray:
    """Log-probs of the turn's tokens from the model's own pass of one text without a cache."""
    text = torch.tensor([*ask.ids, *turn.tokens], device=loaded.device)
    logits_TV = loaded.net(input_ids=text[None], use_cache=False).logits[0, len(ask.ids) - 1 : -1]
    logp_TV = logits_TV[:, : loaded.vocabulary].float().log_softmax(-1)
    return logp_TV.gather(-1, text[len(ask.ids) :, None])[:, 0].cpu().numpy()


def same(ones: Sequence[Turn], others: Sequence[Turn]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert (one.tokens, one.finish, one.beyond) == (other.tokens, other.finish, other.beyond)
        np.testing.assert_allclose(one.logp_T, other.logp_T, rtol=0, atol=BOUND)
        np.testing.assert_allclose(one.raw_T, other.raw_T, rtol=0, atol=BOUND)
        assert one.version_T.tolist() == other.version_T.tolist()
        if one.behaviour_TK is None or other.behaviour_TK is None:
            assert one.behaviour_TK is other.behaviour_TK
        else:
            assert one.behaviour_TK[0].tolist() == other.behaviour_TK[0].tolist()
            np.testing.assert_allclose(one.behaviour_TK[1], other.behaviour_TK[1], rtol=0, atol=BOUND)


@pytest.mark.parametrize("kind", MODELS)
def test_turns_are_those_of_one_token_at_a_time_and_log_probs_the_models_own(kind: str) -> None:
    loaded = model(**MODELS[kind])
    asks = asked(loaded)
    eager = decode(loaded, asks, lambda: 3)
    static = decode(loaded, asks, lambda: 3, opened(loaded))
    same(static, eager)
    assert {turn.finish for turn in static} == {"stop", "length"}
    for ask, turn in zip(asks, static, strict=True):
        np.testing.assert_allclose(turn.raw_T, own_logp(loaded, ask, turn), rtol=0, atol=BOUND)


@pytest.mark.parametrize(
    ("how", "top_k"),
    [
        ({"temperature": 0.0}, 0),
        ({"temperature": 0.7}, 3),
        ({"top_p": 0.6}, 0),
        ({"temperature": 1.4, "top_p": 0.8}, 2),
        ({}, 200),
    ],
)
def test_temperature_top_p_and_the_recorded_top_k(how: dict[str, float], top_k: int) -> None:
    loaded = model("llama")
    asks = asked(loaded, draw=replace(DRAW, **how), top_k=top_k)
    same(decode(loaded, asks, lambda: 0, opened(loaded)), decode(loaded, asks, lambda: 0))


@pytest.mark.parametrize("size", [1, 4])
def test_a_stop_text_ends_a_row_in_the_middle_of_a_chunk(size: int) -> None:
    loaded = model("qwen3")
    decoder, asks = opened(loaded), asked(loaded)
    free = decode(loaded, asks, lambda: 0, decoder)
    longest = max(free, key=lambda turn: len(turn.tokens))
    # tokens 21 and following: the sixth of the second chunk
    word = loaded.tokenizer.decode(longest.tokens[21 : 21 + size])
    assert len(word) == size
    asks = asked(loaded, draw=replace(DRAW, stop=(word,)))
    turns = decode(loaded, asks, lambda: 0, decoder)
    same(turns, decode(loaded, asks, lambda: 0))
    assert len(turns[free.index(longest)].tokens) <= 21 + size < len(longest.tokens)


def test_tokens_are_read_back_once_in_every_16(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = model("llama")
    decoder, read = opened(loaded), []
    copy = static_rows._read_back
    monkeypatch.setattr(
        static_rows, "_read_back", lambda results, count: read.append(count) or copy(results, count)
    )
    for most in (1, 16, 17, 50):
        read.clear()
        asks = [replace(ask, max_tokens=most) for ask in asked(loaded)]
        longest = max(len(turn.tokens) for turn in decode(loaded, asks, lambda: 0, decoder))
        assert len(read) == math.ceil(longest / bucket.LOOK_EVERY)
        assert sum(read) <= most


def test_rows_move_to_smaller_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 rows in a bucket of 48, which end at different times."""
    loaded = model("llama")
    asks, decoder = asked(loaded, 40), opened(loaded)
    moved: list[int] = []
    take_over = bucket.Bucket.take_over
    monkeypatch.setattr(
        bucket.Bucket,
        "take_over",
        lambda self, other, index: moved.append(self.rows) or take_over(self, other, index),
    )
    turns = decode(loaded, asks, lambda: 0, decoder)
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] == 8
    same(turns, decode(loaded, asks, lambda: 0))
    # once more with buffers that are in use already
    same(decode(loaded, asks, lambda: 0, decoder), turns)


def test_long_prompts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = model("qwen3")
    asks, decoder = asked(loaded), opened(loaded)
    whole, read = decode(loaded, asks, lambda: 0, decoder), []
    forward = prompts.Prompts._read
    monkeypatch.setattr(prompts, "_TOKENS", 50)
    monkeypatch.setattr(
        prompts.Prompts,
        "_read",
        lambda self, start, stop, width: (
            read.append((stop - start, width)) or forward(self, start, stop, width)
        ),
    )
    same(decode(loaded, asks, lambda: 0, decoder), whole)
    assert [width for _, width in read] == sorted((width for _, width in read), reverse=True)
    assert all(rows == 1 or rows * width <= 50 for rows, width in read)
    # two of the nine prompts are equal
    assert sum(rows for rows, _ in read) == 8


def test_a_finished_row_stays_within_the_table_of_positions() -> None:
    """A long prompt with one more token, beside a short one with many: positions end at 48."""
    loaded = model("gpt2", n_embd=32, n_head=4, n_layer=2, max_position_embeddings=48)
    assert loaded.trunk.wpe.num_embeddings == 48
    asks = [TurnRequest(list(range(2, 49)), 1, 3, DRAW), TurnRequest([5], 40, 4, DRAW)]
    same(decode(loaded, asks, lambda: 0, opened(loaded)), decode(loaded, asks, lambda: 0))


def test_numbers_that_are_none_do_not_outlive_their_weights() -> None:
    loaded, other = model("llama"), model("llama", seed=5)
    decoder, asks = opened(loaded), asked(loaded)
    broken = {name: torch.full_like(value, torch.nan) for name, value in other.net.state_dict().items()}
    publish(loaded, broken)
    decode(loaded, asks, lambda: 0, decoder)
    publish(loaded, other.net.state_dict())
    same(decode(loaded, asks, lambda: 0, decoder), decode(other, asks, lambda: 0))


def publish(loaded: Model, weights: dict[str, Any]) -> None:
    """As a sampler takes new weights: into the tensors that it has."""
    with torch.no_grad():
        for name, value in weights.items():
            loaded.net.state_dict()[name].copy_(value)


def test_published_weights_keep_the_graphs_and_moved_weights_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, other = model("qwen3"), model("qwen3", seed=5)
    decoder, asks = opened(loaded), asked(loaded)
    decode(loaded, asks, lambda: 0, decoder)
    captured: list[object] = []
    monkeypatch.setattr(static_decoder.Graphs, "of", lambda self, work, state: captured.append(state) or work)
    publish(loaded, other.net.state_dict())
    same(decode(loaded, asks, lambda: 0, decoder), decode(other, asks, lambda: 0))
    assert captured == []
    norm = loaded.trunk.norm
    norm.weight = torch.nn.Parameter(norm.weight * 0.5)
    turns = decode(loaded, asks, lambda: 0, decoder)
    assert len(captured) > 0
    same(turns, decode(loaded, asks, lambda: 0))


def test_what_is_no_longer_used_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph too, and without a search for cycles: the buffers of a smaller batch, and what was read
    of the prompts before.
    """
    loaded = model("llama")
    decoder, asks = opened(loaded), asked(loaded)
    monkeypatch.setattr(prompts, "_TOKENS", 40)
    read, chunks = prompts.Prompts._read, list[weakref.ref[Any]]()

    def reading(self: prompts.Prompts, *where: int) -> Any:
        assert all(chunk() is None for chunk in chunks)
        states, h_BH = read(self, *where)
        chunks.extend(map(weakref.ref, states))
        return states, h_BH

    monkeypatch.setattr(prompts.Prompts, "_read", reading)
    gc.collect()
    gc.disable()
    try:
        decode(loaded, asks[:2], lambda: 0, decoder)
        layers: list[Any] = [layer for b in decoder.buckets.values() for layer in b.cache.layers]
        buffers = [weakref.ref(layer.keys) for layer in layers]
        del layers
        decode(loaded, asks, lambda: 0, decoder)
        assert all(buffer() is None for buffer in buffers)
        assert len(chunks) > 6
    finally:
        gc.enable()


def test_the_oldest_graphs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = model("llama")
    decoder = opened(loaded)
    monkeypatch.setattr(static_decoder, "_MOST", 2)
    for temperature in (0.5, 0.6, 0.7, 0.8):
        asks = asked(loaded, draw=replace(DRAW, temperature=temperature))
        same(decode(loaded, asks, lambda: 0, decoder), decode(loaded, asks, lambda: 0))
    assert len(decoder.buckets) == 2


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("mamba", {"state_size": 8}, "is no key-value cache"),
        ("rwkv", {"attention_hidden_size": 32}, "is no key-value cache"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "another state"),
    ],
)
def test_other_states_are_refused_with_the_reason(kind: str, more: dict[str, Any], why: str) -> None:
    reason = open_decoder(model(kind, **more))
    assert isinstance(reason, str)
    assert why in reason


def test_a_step_that_differs_from_the_models_own_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a later transformers changes: here, positions that stand still."""
    loaded = model("llama")
    step = bucket.Bucket._step

    def late(self: bucket.Bucket) -> None:
        self.place_B -= 1
        step(self)
        self.place_B += 1

    monkeypatch.setattr(bucket.Bucket, "_step", late)
    reason = open_decoder(loaded)
    assert isinstance(reason, str)
    assert "from the model's own forward pass" in reason
    # the attention that was set for the trial is the former one again
    assert loaded.net.config._attn_implementation == "sdpa"


def test_sixteen_bits_agree_within_their_rounding() -> None:
    loaded = model("qwen3")
    narrow = as_model(loaded.net.to(torch.bfloat16), character_tokenizer())
    asks = asked(narrow)
    for ask, turn in zip(asks, decode(narrow, asks, lambda: 0, opened(narrow)), strict=True):
        gap_T = np.abs(turn.raw_T - own_logp(narrow, ask, turn))
        assert np.median(gap_T) < 0.05


@pytest.mark.parametrize(
    ("count", "rows"), [(1, 2), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (84, 96)]
)
def test_rows_are_rounded_up(count: int, rows: int) -> None:
    assert static_rows._rounded(count, static_rows._ROWS) == rows
    columns = static_rows._rounded(64 * count, static_rows._COLUMNS)
    assert 64 * count <= columns <= 64 * count * 1.25


@pytest.mark.parametrize("masked", [True, False])
def test_query_heads_that_share_keys_attend_as_with_copies_of_the_keys(masked: bool) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    loaded = model("llama")
    dice = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(3, heads, count, 8, generator=dice).to(DEVICE)
        for heads, count in ((4, 1), (2, 9), (2, 9))
    )
    mask = (torch.rand(3, 1, 1, 9, generator=dice) < 0.7).to(DEVICE) if masked else None
    layer = loaded.trunk.layers[0].self_attn
    asked = (layer, query, key, value, mask)
    expected = sdpa_attention_forward(*asked, scaling=0.3)[0]
    made = grouped_attention._attention(layer, asked[1:], {"scaling": 0.3})[0]
    torch.testing.assert_close(made, expected)


def test_a_failed_capture_is_told_and_decoding_goes_on() -> None:
    loaded = model("llama")
    asks, decoder = asked(loaded), opened(loaded)
    way = Way(decoder, "CUDA graphs")
    assert (way.slow, way.text) == (False, "CUDA graphs")
    decoder.graphs.failure = "operation not permitted"
    assert (way.slow, "failed: operation not permitted" in way.text) == (True, True)
    same(decode(loaded, asks, lambda: 0, decoder), decode(loaded, asks, lambda: 0))
