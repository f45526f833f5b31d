"""Merged linear layers, against the products of each layer in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reflux.kernels import merged
from reflux.kernels.merged import MergedLinear

# the inputs of every way: (smallest matrix that is not copied, calls)
WAYS = {"one matrix": (1 << 30, 0), "packed": (0, merged._CALLS), "apart": (0, 0)}


@pytest.mark.parametrize("rows", [1, 3, 8, 64, 65])
@pytest.mark.parametrize("biases", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("way", WAYS)
def test_the_outputs_stand_side_by_side(
    way: str, biases: tuple[bool, bool], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows have been dropped since."""
    small, calls = WAYS[way]
    monkeypatch.setattr(merged, "_SMALL", small)
    torch.manual_seed(rows)
    layers = [nn.Linear(20, size, bias=bias) for size, bias in zip((12, 7), biases, strict=True)]
    with torch.inference_mode():
        made = MergedLinear(layers, rows, calls)
        packed = way == "packed" and 3 <= rows <= 64 and torch.backends.mkl.is_available()
        assert bool(made.packed) == packed
        for left in {rows, (rows + 1) // 2, 1}:
            x = torch.randn(left, 20)
            own = [x.double() @ layer.weight.double().T for layer in layers]
            own = [
                out + (0 if m.bias is None else m.bias.double()) for out, m in zip(own, layers, strict=True)
            ]
            torch.testing.assert_close(made(x).double(), torch.cat(own, -1), rtol=1e-5, atol=1e-5)
