"""Linear layers with the same input as one matrix product, for the few rows of a decode step on a CPU.

With few rows, MKL rearranges a matrix at each call, which takes about as long as the multiplication. A large
matrix that many calls use is therefore rearranged (packed) once. The mathematics and the precision are the
same; the order of summation is different.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Smaller matrices are copied into one, because the calls take longer than the products.
_SMALL = 1 << 18
# numbers of rows for which a packed matrix is faster
_ROWS = range(3, 65)
# With fewer calls, packing takes longer than it saves.
_CALLS = 32


class MergedLinear:
    """`merged(x_BI)` gives the outputs of all layers side by side, [B, sum of O]. No gradient.

    layers: `nn.Linear` modules in float32 on a CPU, with one input size. Their weights are read here, once.
    rows: B. Calls may have fewer rows. calls: the number of calls that are expected.
    """

    def __init__(self, layers: Sequence[Any], rows: int, calls: int):
        self.parts, self.rows = [(layer.weight, layer.bias) for layer in layers], rows
        self.packed: list[Tensor] = []
        if sum(weight.numel() for weight, _ in self.parts) < _SMALL:
            self.parts = [_joined(self.parts)]
        elif rows in _ROWS and calls >= _CALLS and _available():
            self.packed = [torch.ops.mkl._mkl_reorder_linear_weight(w, rows) for w, _ in self.parts]

    def __call__(self, x_BI: Tensor) -> Tensor:
        rows = len(x_BI)
        if self.packed and 2 * rows >= self.rows:
            # A packed matrix is for one number of rows.
            x_RI = x_BI if rows == self.rows else F.pad(x_BI, (0, 0, 0, self.rows - rows))
            pairs = zip(self.packed, self.parts, strict=True)
            outs = [
                torch.ops.mkl._mkl_linear(x_RI, packed, w, b, self.rows)[:rows] for packed, (w, b) in pairs
            ]
        else:
            outs = [F.linear(x_BI, weight, bias) for weight, bias in self.parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


def _available() -> bool:
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def _joined(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases, one below the other. The bias is None where no layer has one."""
    weight = torch.cat([weight for weight, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    return weight, torch.cat([w.new_zeros(len(w)) if bias is None else bias for w, bias in parts])
