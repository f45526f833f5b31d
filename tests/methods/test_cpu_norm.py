"""Root-mean-square norms with a backward of their own: against float64 from the formula, and only where the
class computes that formula.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import tiny
from reflux.models.cpu.norm import fuse_norms, rms_norm

# large enough to be seen
EPS = 0.03


def case(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x far from zero mean, a weight far from one, and a gradient."""
    rng = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(shape, generator=rng) * 0.5 + 0.7, torch.randn(shape, generator=rng) + 0.4
    return x, torch.randn(shape[-1], generator=rng) + 0.5, grad


def expected(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value and both gradients with numpy in float64, the Jacobian written out."""
    x_ND, w_D, g_ND = (np.asarray(t, dtype=np.float64).reshape(-1, x.shape[-1]) for t in (x, weight, grad))
    scale_N = ((x_ND**2).mean(-1) + EPS) ** -0.5
    jacobian_NDD = (
        scale_N[:, None, None] * np.eye(x.shape[-1])
        - np.einsum("ni,nj,n->nij", x_ND, x_ND, scale_N**3) / x.shape[-1]
    )
    normed_ND = x_ND * scale_N[:, None]
    grad_ND = np.einsum("nj,nji->ni", g_ND * w_D, jacobian_NDD)
    return (normed_ND * w_D).reshape(x.shape), grad_ND.reshape(x.shape), (g_ND * normed_ND).sum(0)


@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 24), (3, 4, 2, 6), (600, 1), (1, 96)])
def test_value_and_gradients_are_the_formulas(shape: tuple[int, ...]) -> None:
    x, weight, grad = case(shape)
    x.requires_grad_()
    weight.requires_grad_()
    made = rms_norm(x, weight, EPS)
    made.backward(grad)
    for found, wanted in zip(
        (made, x.grad, weight.grad), expected(x.detach(), weight.detach(), grad), strict=True
    ):
        assert found is not None
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=2e-5, atol=2e-5)


def test_transposed_rows_and_gradients_are_read_as_they_lie() -> None:
    x, weight, grad = case((4, 3, 5, 8))
    plain, turned = (
        x.clone().requires_grad_(),
        x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
    )
    rms_norm(plain, weight, EPS).backward(grad)
    rms_norm(turned, weight, EPS).backward(grad.transpose(0, 3).contiguous().transpose(0, 3))
    assert plain.grad is not None
    torch.testing.assert_close(turned.grad, plain.grad)


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_only_what_moves_has_a_gradient(needed: str) -> None:
    x, weight, grad = case((6, 8))
    moved, still = (x, weight) if needed == "x" else (weight, x)
    moved.requires_grad_()
    rms_norm(x, weight, EPS).backward(grad)
    wanted = expected(x.detach(), weight.detach(), grad)[1 if needed == "x" else 2]
    assert moved.grad is not None
    np.testing.assert_allclose(moved.grad.numpy(), wanted, rtol=2e-5, atol=2e-5)
    assert still.grad is None


class OnePlusRMSNorm(LlamaRMSNorm):
    """Same attributes, another formula."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states


def test_only_classes_that_pass_the_trial_are_replaced() -> None:
    net = nn.ModuleDict(
        {
            "llama": LlamaRMSNorm(8),
            "qwen": Qwen3RMSNorm(8),
            "gemma": Gemma2RMSNorm(8),
            "other": OnePlusRMSNorm(8),
        }
    )
    net["coarse"] = LlamaRMSNorm(8).bfloat16()
    x = torch.randn(3, 8)
    own = {name: module(x) for name, module in net.items()}
    before = torch.get_rng_state()
    fuse_norms(net)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name for name, module in net.items() if "forward" in vars(module)} == {"llama", "qwen"}
    for name, module in net.items():
        torch.testing.assert_close(module(x), own[name])


def test_a_whole_model_keeps_its_gradients() -> None:
    ids = torch.arange(40).view(2, 20) + 6
    grads = []
    for fused in (False, True):
        net = tiny.net(1, layers=2)
        if fused:
            fuse_norms(net)
        net(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    tiny.close(*grads, rtol=2e-5)


def test_a_published_weight_is_read() -> None:
    norm = LlamaRMSNorm(8)
    fuse_norms(norm)
    x = torch.randn(3, 8)
    shared_cache = norm(x)
    with torch.no_grad():
        norm.weight.copy_(torch.full((8,), 3.0))
    torch.testing.assert_close(norm(x), 3 * shared_cache)
