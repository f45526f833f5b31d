"""Texts that are read one after the other in one row give what each gives alone; the trial says where not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import tiny
from architectures import tiny_models
from reflux.assets.characters import character_tokenizer
from reflux.models import packed_attention
from reflux.models.cut import cut
from reflux.models.packed_attention import attending_packed, trial, why_padded
from reflux.models.text import Model, as_model
from reflux.models.text_rows import packed, padded
from reflux.models.training_mode import recompute_activations

PACKED = ["llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "cohere", "granite"]
PADDED = ["gpt2", "gemma2", "mamba2", "qwen3_next", "falcon (alibi)", "lfm2"]
# whose experts torch multiplies in float32 or narrower only
FLOAT32 = {"qwen3_moe": 1e-4, "deepseek_v3": 1e-4}
LENGTHS = (4, 1, 11, 6)


def texts(size: int = 100) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(6, size, length) for length in LENGTHS]


def made(name: str, folder: Path) -> Model:
    from transformers import AutoModelForCausalLM

    tokenizer = character_tokenizer()
    tiny_models.build(name, folder, tokenizer)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return as_model(net.eval(), tokenizer)


def states_and_gradient(model: Model, pack: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The states of all tokens, text by text, and the gradient of a fixed function of them."""
    rows = (packed if pack else padded)(texts(model.vocabulary), torch.device("cpu"))
    with attending_packed(model.net) if pack else nullcontext():
        h_NH = rows.states(model.trunk)
        real = [h_NH[start : start + length] for start, length in zip(rows.starts, LENGTHS, strict=True)]
        h_NH = torch.cat(real)
        model.net.zero_grad()
        (h_NH * torch.arange(h_NH.numel(), dtype=h_NH.dtype).view_as(h_NH).cos()).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.net.named_parameters() if p.grad is not None}
    return h_NH.detach(), grads


def close(ones: dict[str, Tensor], others: dict[str, Tensor], bound: float = 1e-6) -> None:
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        torch.testing.assert_close(others[name], one, rtol=bound, atol=bound * float(one.abs().max()))


@pytest.mark.parametrize("name", PACKED)
def test_packed_texts_are_single_texts(name: str, tmp_path: Path) -> None:
    model = made(name, tmp_path)
    assert trial(model, nullcontext()) == ""
    bound = FLOAT32.get(name, 1e-6)
    if name not in FLOAT32:
        model.net.double()
    one_NH, one = states_and_gradient(model, pack=False)
    other_NH, other = states_and_gradient(model, pack=True)
    torch.testing.assert_close(other_NH, one_NH, rtol=bound, atol=bound)
    close(one, other, bound)
    # afterwards the model attends as before
    torch.testing.assert_close(states_and_gradient(model, pack=False)[0], one_NH)


@pytest.mark.parametrize("name", PADDED)
def test_other_layers_are_padded_and_the_reason_is_given(name: str, tmp_path: Path) -> None:
    assert "full attention" in trial(made(name, tmp_path), nullcontext())


def test_recomputed_activations_are_packed_too() -> None:
    model = as_model(tiny.net(1, layers=2).double(), character_tokenizer())
    kept = states_and_gradient(model, pack=True)[1]
    recompute_activations(model.net)
    close(kept, states_and_gradient(model, pack=True)[1])
    assert any(getattr(module, "training", False) for module in model.net.modules())


def test_the_trial_finds_attention_across_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_model(tiny.net(1, layers=2), character_tokenizer())

    def across(*qkv: Any) -> Tensor:
        return F.scaled_dot_product_attention(*qkv[:3], is_causal=True, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(packed_attention, "_text_by_text", across)
    assert "differ" in trial(model, nullcontext())


def test_a_kernel_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> Tensor:
        raise RuntimeError("no kernel for this device\nand more")

    monkeypatch.setattr(packed_attention, "_text_by_text", missing)
    model = as_model(tiny.net(1), character_tokenizer())
    assert trial(model, nullcontext()) == "variable-length attention fails on it: no kernel for this device"


def test_on_a_cpu_a_wide_model_reads_packed_rows() -> None:
    """Whether it does is read from its width and not timed, so that a resumed run computes the same."""
    narrow, wide = (as_model(tiny.net(1, width=width), character_tokenizer()) for width in (252, 256))
    assert "small model" in why_padded(narrow, nullcontext())
    assert why_padded(wide, nullcontext()) == ""
    assert "'meta'" in why_padded(as_model(wide.net.to("meta"), character_tokenizer()), nullcontext())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trial_allows_for_the_rounding_of_16_bits(dtype: torch.dtype) -> None:
    model = as_model(tiny.net(1, layers=2, width=256).to(dtype), character_tokenizer())
    assert trial(model, nullcontext()) == ""


def test_arguments_of_another_attention_are_refused() -> None:
    q = torch.ones(1, 1, 2, 4)
    others: list[dict[str, Any]] = [{"softcap": 30.0}, {"s_aux": torch.ones(1)}, {"sliding_window": 4}, {}]
    for more in others:
        bounds = torch.tensor([0, 2]) if more else None
        with pytest.raises((NotImplementedError, TypeError)):
            packed_attention.packed_attention(None, q, q, q, None, cu_seq_lens_q=bounds, **more)


def test_a_packed_row_has_every_token_once_and_positions_of_its_own_for_each_text() -> None:
    rows = packed(texts(), torch.device("cpu"))
    assert rows.ids_BL[0].tolist() == np.concatenate(texts()).tolist()
    assert rows.starts == [0, 4, 5, 16]
    assert rows.arguments["position_ids"][0].tolist() == [*range(4), 0, *range(11), *range(6)]
    assert rows.arguments["cu_seq_lens_q"].tolist() == [0, 4, 5, 16, 22]
    assert (rows.arguments["max_length_q"], rows.arguments["cu_seq_lens_q"].dtype) == (11, torch.int32)


@pytest.mark.parametrize(("narrow", "older"), [(0, False), (3, False), (0, True)])
def test_the_kernel_gets_what_it_takes(narrow: int, older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's function, imitated by its documentation, gives the same as text by text. narrow: how much less
    wide values are than keys. older: the version that takes shared heads without being asked to.
    """
    from torch.nn.attention import varlen

    def before(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert q.ndim == k.ndim == v.ndim == 3
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert window_size == (-1, 0)
        assert cu_q.dtype == torch.int32
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == int(cu_q.diff().max())
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return packed_attention._text_by_text(q, k, v, scale, cu_q.tolist())[0]

    def since(*given: Any, enable_gqa: bool = False, **settings: Any) -> Tensor:
        assert enable_gqa
        return before(*given, **settings)

    monkeypatch.setattr(varlen, "varlen_attn", before if older else since)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8 - narrow)
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
    found = packed_attention._by_kernel(q, k, v, 0.3, bounds, 7)
    torch.testing.assert_close(found, packed_attention._text_by_text(q, k, v, 0.3, bounds.tolist()))


@pytest.mark.skipif(find_spec("torch.nn.attention.varlen") is None, reason="this torch has no such kernel")
def test_a_compiled_layer_calls_the_kernel_with_plain_settings_and_without_copies() -> None:
    """For any number of tokens, as layers are compiled. Nothing runs: the kernel needs a GPU."""
    called: list[tuple[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        called.extend((str(node.target), node.args) for node in nodes)
        return lambda *given: (given[0],)

    q, k, v = (torch.randn(1, heads, 10, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
    compiled = torch.compile(packed_attention._by_kernel, backend=backend, fullgraph=True, dynamic=True)
    compiled(q, k, v, 0.3, bounds, 7)
    (settings,) = [args for name, args in called if "_varlen_attn" in name]
    # causal, and with shared heads
    assert [value for value in settings if isinstance(value, bool)] == [True, True]
    assert not [name for name, _ in called if "pad" in name]


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(1, 50), st.booleans())
@settings(max_examples=80, deadline=None)
def test_parts_hold_every_text_once_within_the_budget(lengths: list[int], budget: int, pack: bool) -> None:
    lengths = sorted(lengths, reverse=True)
    parts = [lengths[part] for part in cut(lengths, lambda: budget, pack)]
    assert [length for part in parts for length in part] == lengths
    costs = [tokens(part, pack) for part in parts]
    assert all(cost <= budget or len(part) == 1 for cost, part in zip(costs, parts, strict=True))
    # no text of the next part would have fitted
    assert all(tokens([*one, other[0]], pack) > budget for one, other in itertools.pairwise(parts))


def tokens(part: Sequence[int], pack: bool) -> int:
    return sum(part) if pack else len(part) * max(part)


def test_the_budget_is_asked_for_every_part() -> None:
    budgets = iter([1, 2, 4, 8])
    assert [len(range(8)[part]) for part in cut([1] * 8, lambda: next(budgets), True)] == [1, 2, 4, 1]
