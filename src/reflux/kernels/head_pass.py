"""One pass through the student's output head (the matrix that maps hidden states to logits). It returns
matrices of logits, takes their gradients, and sums up the gradient of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from reflux.kernels import products
from reflux.kernels.head import Head


class HeadPass(Protocol):
    # one gradient for each of `parameters(head)`, summed over the chunks
    grads: list[Tensor | None]

    def table(self, h_NH: Tensor) -> Tensor:
        """Raw logits [N, V] (before scaling and cap) that the caller may overwrite with their gradient."""
        ...

    def begin(self, h_NH: Tensor) -> None:
        """Begin a chunk. `wide` then computes its raw logits block by block."""
        ...

    def wide(self, rows: slice) -> Tensor:
        """Raw logits of some rows of the chunk in float32. There may be gaps between the rows in memory."""
        ...

    def new_gradient(self) -> Tensor:
        """An uninitialised matrix for the gradient of all rows of the chunk, as `back` takes it."""
        ...

    def back(self, d_NV: Tensor, hidden: bool) -> Tensor | None:
        """Take d_NV, the gradient of the raw logits of all rows of the last `table` or `begin`. Returns the
        gradient of the hidden states of these rows if `hidden`.
        """
        ...


def parameters(head: Head) -> list[Tensor]:
    """The tensors through which a gradient reaches the head."""
    module = head.module
    if head.matrix is None:
        assert isinstance(module, nn.Module)
        return [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [tensor for tensor in (module.weight, module.bias) if isinstance(tensor, Tensor)]


def open_pass(head: Head, needs: Sequence[bool] | None, alone: bool = False) -> HeadPass:
    """Begin a pass. needs: for each of `parameters(head)`, True if it needs a gradient; None if nothing needs
    a gradient, not even the hidden states. alone: True if there is only one chunk, so nothing is summed.
    """
    if head.matrix is None:
        return _Module(head, needs is not None)
    return _Matrix(head, [False] * len(parameters(head)) if needs is None else needs, alone)


class _Matrix:
    """A pass with hand-written products. The head's gradient is summed in place, in float32 or wider, without
    a second matrix of its size. The gradient of one chunk alone has the dtype of the head at once.
    """

    def __init__(self, head: Head, needs: Sequence[bool], alone: bool):
        assert head.matrix
        weight_VH, self.bias_V = (None if tensor is None else tensor.detach() for tensor in head.matrix)
        self.grads: list[Tensor | None] = [
            (torch.zeros_like(tensor) if alone else _sum_like(tensor)) if need else None
            for tensor, need in zip(parameters(head), needs, strict=True)
        ]
        # True until the first chunk is added to the gradient of the weight
        self.fresh = True
        assert weight_VH is not None
        device = weight_VH.device.type
        self.weight_VH = (
            weight_VH.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight_VH
        )

    def new_gradient(self) -> Tensor:
        rows, vocabulary = len(self.h_NH), len(self.weight_VH)
        return self.h_NH.new_empty(rows, products.aligned(vocabulary))[:, :vocabulary]

    def begin(self, h_NH: Tensor) -> None:
        self.h_NH = h_NH.detach().to(self.weight_VH.device, self.weight_VH.dtype)

    def table(self, h_NH: Tensor) -> Tensor:
        self.begin(h_NH)
        raw_NV = products.scores(self.h_NH, self.weight_VH)
        return raw_NV if self.bias_V is None else raw_NV.add_(self.bias_V)

    def wide(self, rows: slice) -> Tensor:
        raw_NV = products.wide_scores(self.h_NH[rows], self.weight_VH)
        return raw_NV if self.bias_V is None else raw_NV.add_(self.bias_V)

    def back(self, d_NV: Tensor, hidden: bool) -> Tensor | None:
        weight, *bias = self.grads
        if weight is not None:
            products.add_outer(weight[: len(self.weight_VH)], d_NV, self.h_NH, self.fresh)
            self.fresh = False
        for total_V in bias:
            if total_V is not None:
                total_V[: len(self.weight_VH)] += d_NV.sum(0, dtype=total_V.dtype)
        return products.pull_back(d_NV, self.weight_VH) if hidden else None


class _Module:
    """A pass with autograd, chunk by chunk, for heads with adapters. The adapters are small, and their
    frozen base needs no gradient.
    """

    def __init__(self, head: Head, wanted: bool):
        self.head, self.parameters, self.wanted = head, parameters(head) if wanted else [], wanted
        self.grads: list[Tensor | None] = [_sum_like(parameter) for parameter in self.parameters]

    def new_gradient(self) -> Tensor:
        return torch.empty_like(self.raw_NV)

    def begin(self, h_NH: Tensor) -> None:
        self.leaf_NH = h_NH.detach().requires_grad_(self.wanted)
        with torch.set_grad_enabled(self.wanted):
            self.raw_NV = self.head.raw(self.leaf_NH)

    def wide(self, rows: slice) -> Tensor:
        return self.raw_NV[rows].detach().to(torch.float32, copy=True)

    def table(self, h_NH: Tensor) -> Tensor:
        self.begin(h_NH)
        # The logits are cloned, because the graph may need the values that the caller overwrites.
        return self.raw_NV.detach().clone()

    def back(self, d_NV: Tensor, hidden: bool) -> Tensor | None:
        grad_NH, *grads = torch.autograd.grad(
            self.raw_NV, [self.leaf_NH, *self.parameters], d_NV, allow_unused=True
        )
        for total, grad in zip(self.grads, grads, strict=True):
            if total is not None and grad is not None:
                total += grad
        return grad_NH


def _sum_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
