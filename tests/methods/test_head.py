"""Heads of real model classes: the logits and gradients that the model's own forward gives, adapters and
scalings included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from reflux.kernels import head as head_module
from reflux.kernels import row_pass
from reflux.kernels.head import Bare, Head
from reflux.loss.linear_divergence import linear_divergence

close = torch.testing.assert_close
V, PAD = 40, 5
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SCALED = {
    "Cohere": {"logit_scale": 0.3},
    "Cohere2": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0, "tie_word_embeddings": False},
    "Gemma2": {"final_logit_softcapping": 0.8, "head_dim": 8},
    "Gemma3Text": {"final_logit_softcapping": 0.8, "head_dim": 8},
    "Llama": {"tie_word_embeddings": False},
}


def net(name: str) -> Any:
    """From random numbers, in float64, with rows of padding."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V + PAD, pad_token_id=0, **SHAPE, **SCALED[name]
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4) if parameter.ndim == 2 else None
    return model


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_pass, "chunk_rows", lambda vocabulary, device, tables: 7)
    monkeypatch.setattr(row_pass, "block_rows", lambda vocabulary, device: 3)


class Words:
    """Two sequences through a model, and a teacher's word on them."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.float64):
        rng = torch.Generator().manual_seed(3)
        self.model, self.head = model, Head.of_net(model, V)
        self.ids_BL = torch.randint(V, (2, 9), generator=rng)
        self.teacher = [
            torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype) for shape in ((18, 6), (V, 6))
        ]
        self.coef_N = torch.rand(18, generator=rng, dtype=torch.float64).to(dtype) - 0.3

    def hidden(self) -> Tensor:
        return self.model.base_model(input_ids=self.ids_BL, use_cache=False).last_hidden_state.flatten(0, 1)

    def own_logits(self) -> Tensor:
        return self.model(input_ids=self.ids_BL, use_cache=False).logits.flatten(0, 1)[:, :V]

    def loss(self) -> Tensor:
        g_NG, weight_VG = self.teacher
        return linear_divergence(
            self.hidden(), self.head, g_NG, Head.of(weight_VG), self.ids_BL.flatten(), self.coef_N
        ).loss

    def plain_loss(self) -> Tensor:
        """From the model's own logits, by plain autograd."""
        s, t = (x.double().log_softmax(-1) for x in (self.own_logits(), self.teacher[0] @ self.teacher[1].T))
        return (self.coef_N * (s.exp() * (s - t)).sum(-1)).sum()

    def gradients(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return dict(zip(trained, torch.autograd.grad(loss(), list(trained.values())), strict=True))


def check_gradients(words: Words) -> dict[str, Tensor]:
    close(words.loss(), words.plain_loss())
    expected = words.gradients(words.plain_loss)
    tiny.close(expected, words.gradients(words.loss))
    return expected


@pytest.mark.parametrize("name", SCALED)
def test_logits_and_gradients_are_those_of_the_models_own_forward(name: str) -> None:
    words = Words(net(name))
    own_NV = words.own_logits()
    close(words.head.logits(words.hidden()), own_NV)
    with torch.no_grad():
        close(words.head.logits(words.hidden()), own_NV)
        bare_NV = words.hidden() @ words.model.get_output_embeddings().weight[:V].T
    # the scaling does something
    assert (name == "Llama") == torch.allclose(bare_NV, own_NV, rtol=0.05)
    check_gradients(words)


def test_a_head_with_a_bias_and_padding() -> None:
    model = net("Llama")
    model.lm_head = nn.Linear(16, V + PAD, bias=True).double()
    expected = check_gradients(Words(model))
    assert (expected["lm_head.bias"][V:] == 0).all()
    assert expected["lm_head.bias"].abs().max() > 1e-3


ADAPTERS = {
    "lora": {"target_modules": ["lm_head"]},
    "lora on trunk and head": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "a trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(model: Any, **settings: Any) -> Any:
    """By peft, with adapters that are not at identity."""
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **settings))
    for name, parameter in made.named_parameters():
        if "lora_" in name and parameter.requires_grad and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return made.base_model.model.double()


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["Llama", "Granite"])
def test_adapters_on_the_head_get_the_gradients_of_the_models_own_forward(kind: str, name: str) -> None:
    model = adapted(net(name), **ADAPTERS[kind])
    words = Words(model)
    assert words.head.matrix is None
    close(words.head.logits(words.hidden()), words.own_logits())
    expected = check_gradients(words)
    ours = [gradient for leaf, gradient in expected.items() if "lm_head" in leaf]
    assert len(ours) == {"dora": 3, "a trained copy": 1}.get(kind, 2)
    assert all(gradient.abs().max() > 1e-3 for gradient in ours)


class Squashed(nn.Linear):
    """A head whose backward needs its output."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input)).exp()


def test_a_head_of_an_unknown_kind_goes_through_its_own_forward() -> None:
    model = net("Llama")
    model.lm_head = Squashed(16, V, bias=True).double()
    assert set(check_gradients(Words(model))) >= {"lm_head.weight", "lm_head.bias"}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_an_adapter_on_a_tied_head_of_a_padded_qwen() -> None:
    model = adapted(tiny.net(0, padded_rows=3).cpu(), target_modules=["lm_head"])
    words = Words(model)
    words.head = Head.of_net(model, V)
    assert set(check_gradients(words)) == {f"lm_head.lora_{x}.default.weight" for x in "AB"}


def head_gradients(words: Words, h_NH: Tensor, plain: bool) -> dict[str, Tensor]:
    """Of given hidden states and of what is trained in the head; plain: by autograd through the head's own
    module.
    """
    leaf_NH = h_NH.detach().to(words.coef_N.dtype).requires_grad_()
    words.hidden = lambda: leaf_NH  # type: ignore[method-assign]
    module = words.model.get_output_embeddings()
    words.own_logits = lambda: module(leaf_NH)[:, :V]  # type: ignore[method-assign]
    trained = {"hidden": leaf_NH} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    loss = words.plain_loss() if plain else words.loss()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("adapter", [False, True])
def test_under_autocast_gradients_are_as_exact_as_plain_autograd_gives_them(adapter: bool) -> None:
    """In bfloat16 both are within 2 % of float64, and the pass is no further off than the plain computation,
    by half of it.
    """
    model = adapted(net("Llama"), target_modules=["lm_head"]) if adapter else net("Llama")
    words = Words(model)
    h_NH = words.hidden()
    exact = head_gradients(words, h_NH, plain=True)
    words = Words(model.float(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (head_gradients(words, h_NH, plain) for plain in (False, True))
    assert len(exact) == 2 + adapter
    for name, gradient in exact.items():
        errors = [float((made[name] - gradient).norm() / gradient.norm()) for made in (ours, plain)]
        assert ours[name].dtype == torch.float32
        assert 1e-5 < errors[0] < min(0.02, 1.5 * errors[1]), name


def test_logp_at_ids_is_cut_scaled_and_capped_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    h_NH, weight_VH, bias_V = (
        torch.randn(*shape, generator=rng) for shape in ((11, 4), (V + PAD, 4), (V + PAD,))
    )
    weight_VH.requires_grad_()
    ids_NK = torch.randint(V, (11, 3), generator=rng)
    head = Head(lambda: Bare(weight_VH, bias_V), V, scale=0.5, cap=1.2)
    logits_NV = 1.2 * torch.tanh((h_NH @ weight_VH.T + bias_V)[:, :V] * 0.5 / 1.2)
    expected_NK = logits_NV.log_softmax(-1).gather(-1, ids_NK)
    for rows in (1, 4, 11, 99):
        monkeypatch.setattr(head_module, "chunk_rows", lambda vocabulary, device, rows=rows: rows)
        made_NK = head.logp_at(h_NH, ids_NK)
        close(made_NK, expected_NK.detach())
        close(head.logp_of(h_NH, ids_NK[:, 1]), expected_NK[:, 1].detach())
        assert not made_NK.requires_grad
    close(head.logits(h_NH), logits_NV)


def test_vocabularies_and_rows_that_do_not_match_are_refused() -> None:
    h_NH, weight_VH = torch.zeros(3, 4), torch.zeros(V, 4)
    ids_N, coef_N = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    with pytest.raises(
        ValueError, match=r"has 40 tokens and the teacher's has 39.*cut both to the tokenizer"
    ):
        linear_divergence(h_NH, Head.of(weight_VH), h_NH, Head.of(weight_VH[1:]), ids_N, coef_N)
    with pytest.raises(ValueError, match=r"all arguments must have one row per position.*'coef_N': 2"):
        linear_divergence(h_NH, Head.of(weight_VH), h_NH, Head.of(weight_VH), ids_N, coef_N[:2])
