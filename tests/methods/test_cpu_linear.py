"""Linear layers through oneDNN: value and gradients against float64, whichever path the size takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from reflux.models.cpu.linear import linear, speed_up


# few rows stay with torch; the largest goes through oneDNN
@pytest.mark.parametrize("rows", [3, 511, 512, 4000])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients(rows: int, biased: bool) -> None:
    rng = torch.Generator().manual_seed(rows)
    layer = nn.Linear(64, 80, bias=biased)
    speed_up(layer)
    x = torch.randn(1, rows, 64, generator=rng, requires_grad=True)
    grad = torch.randn(1, rows, 80, generator=rng)
    layer(x).backward(grad)
    x_NI, g_NO, w_OI = (t.detach().double().numpy() for t in (x[0], grad[0], layer.weight))
    assert x.grad is not None
    np.testing.assert_allclose(x.grad[0].numpy(), g_NO @ w_OI, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.weight.grad.numpy(), g_NO.T @ x_NI, rtol=1e-4, atol=1e-3)  # pyright: ignore[reportOptionalMemberAccess]
    bias_O = layer.bias.detach().double().numpy() if biased else 0.0
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), x_NI @ w_OI.T + bias_O, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x.detach()))
    if biased:
        np.testing.assert_allclose(layer.bias.grad.numpy(), g_NO.sum(0), rtol=1e-4, atol=1e-3)  # pyright: ignore[reportOptionalMemberAccess]


def test_a_frozen_weight_has_no_gradient() -> None:
    layer = nn.Linear(64, 80, bias=False)
    layer.weight.requires_grad_(False)
    speed_up(layer)
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    np.testing.assert_allclose(
        x.grad.numpy(), np.tile(layer.weight.double().sum(0).numpy(), (4000, 1)), rtol=1e-4, atol=1e-5
    )


def test_other_number_types_are_left_to_torch() -> None:
    layer = nn.Linear(8, 4).double()
    speed_up(layer)
    assert "forward" not in vars(layer)
    x = torch.randn(600, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert linear(x, layer.weight, layer.bias).dtype == torch.float64
