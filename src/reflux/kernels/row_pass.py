"""Applies output heads to rows of hidden states in chunks, and computes the student's gradient in the same
pass.

All row coefficients are known before the forward pass, so no chunk has to wait for a backward pass. Each
chunk runs heads, costs and gradients at once and keeps nothing. The peak memory is that of one chunk, and
nothing is computed twice. The length of a chunk suits the matrix products. Inside a chunk, costs and their
gradients are computed on blocks of a few rows that fit into the processor's cache, and each block's
gradient overwrites its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reflux.kernels.budget import block_rows, chunk_rows
from reflux.kernels.fused_pass import FusedLoss, can_fuse, run_fused
from reflux.kernels.head import Head
from reflux.kernels.head_pass import open_pass, parameters
from reflux.kernels.slices import slices

RowLoss = Callable[[slice, Tensor, list[Tensor]], Tensor]
# hidden states without a gradient, with the same rows as the student's, and their head
Constant = tuple[Tensor, Head]


def row_pass(
    h_NH: Tensor,
    head: Head,
    constants: Sequence[Constant],
    row_loss: RowLoss,
    fused_loss: FusedLoss | None = None,
) -> Tensor:
    """The sum of row_loss(rows, logits_NV, others) over blocks of rows, a scalar of at least float32.

    rows: the slice of h_NH of this block. logits_NV: head(h_NH[rows]). others: for each entry of `constants`
    (another model's hidden states and head, without gradient) its logits of these rows.

    Differentiable once, in h_NH and the head's parameters. Any other tensor that `row_loss` uses is a
    constant. Each row is passed to `row_loss` once, in order, outside autocast. `row_loss` must not keep the
    logits that it is given, because their memory is reused. Under `torch.no_grad` no
    gradient is computed. N = 0 gives 0.

    fused_loss: the same loss from raw logits, which writes its gradient itself. It replaces `row_loss` where
    the fused kernels can run (`fused_pass`).
    """
    work = _Work(h_NH.detach(), head, constants, row_loss, fused_loss)
    tensors = [h_NH, *parameters(head)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _RowPass.apply(work, *tensors)  # pyright: ignore[reportReturnType]
    return work.run([False] * len(tensors))[0]


class _RowPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> Tensor:
        total, ctx.grads = work.run(list(ctx.needs_input_grad[1:]))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.grads is None:
            raise RuntimeError(
                "backward can be called only once on this loss, because its gradients were computed in the "
                "forward pass. Run the forward pass again."
            )
        grads, ctx.grads = ctx.grads, None
        return (None, *(None if made is None else made.mul_(grad) for made in grads))


@dataclass
class _Work:
    h_NH: Tensor
    head: Head
    constants: Sequence[Constant]
    row_loss: RowLoss
    fused_loss: FusedLoss | None

    def run(self, needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The sum, and the gradients of hidden states and head parameters for which `needs` is True."""
        if self.fused_loss is not None and can_fuse(self.h_NH):
            total, grads = run_fused(self.h_NH, self.head, self.constants, self.fused_loss, needs)
        else:
            total, grads = self._run_tabled(needs)
        tensors = [self.h_NH, *parameters(self.head)]
        return total, [
            None if grad is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, tensors, strict=False)
        ]

    @torch.no_grad()
    def _run_tabled(self, needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The same by autograd through matrices of logits. The head's gradients are in its precision."""
        h_NH, head = self.h_NH, self.head
        gradient = any(needs)
        opened = open_pass(head, needs[1:] if gradient else None)
        others = [open_pass(other, None) for _, other in self.constants]
        grad_NH = torch.empty_like(h_NH) if needs[0] else None
        total = torch.zeros((), dtype=torch.promote_types(h_NH.dtype, torch.float32), device=h_NH.device)
        tables = 1 + len(self.constants) + (head.matrix is None)
        for rows in slices(len(h_NH), chunk_rows(head.vocabulary, h_NH.device, tables)):
            raw_NV = opened.table(h_NH[rows])
            dtype = torch.promote_types(raw_NV.dtype, torch.float32)
            others_raw = [
                other.table(h[rows]).to(raw_NV.device)
                for other, (h, _) in zip(others, self.constants, strict=True)
            ]
            total += self._blocks(
                rows, raw_NV, [_not_wider(table_NV, dtype) for table_NV in others_raw], gradient
            )
            if gradient:
                grad_nH = opened.back(raw_NV, hidden=grad_NH is not None)
                if grad_NH is not None and grad_nH is not None:
                    grad_NH[rows] = grad_nH
        return total, [grad_NH, *opened.grads]

    def _blocks(self, rows: slice, raw_NV: Tensor, tables: list[Tensor], gradient: bool) -> Tensor:
        """The loss of one chunk. If `gradient`, the gradient of the raw logits overwrites them."""
        total = torch.zeros((), dtype=torch.promote_types(raw_NV.dtype, torch.float32), device=raw_NV.device)
        for block in slices(len(raw_NV), block_rows(self.head.vocabulary, raw_NV.device)):
            logits = [
                other.finish(table[block]) for (_, other), table in zip(self.constants, tables, strict=True)
            ]
            leaf = raw_NV[block].detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient), torch.autocast(raw_NV.device.type, enabled=False):
                loss = self.row_loss(
                    slice(rows.start + block.start, rows.start + block.stop), self.head.finish(leaf), logits
                )
            if gradient:
                raw_NV[block] = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else 0
            total += loss.detach()
        return total


def _not_wider(table_NV: Tensor, dtype: torch.dtype) -> Tensor:
    return table_NV.to(dtype) if table_NV.element_size() > dtype.itemsize else table_NV
