"""The pass of `row_pass` with fused kernels: no autograd through matrices [N, V], and no wait for the device.

A chunk of rows has one gradient [rows, V] in the dtype of the matrix products. Inside a chunk, the raw logits
of all models are computed in float32 for a block of rows at a time, and the block's gradient is written
beside them. So logits are never rounded to bfloat16, whose error in a logit of 10 is 2 %, and few large
products make the gradient of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reflux.kernels.budget import fused_rows
from reflux.kernels.head import Head
from reflux.kernels.head_pass import HeadPass, open_pass
from reflux.kernels.raw_table import RawTable
from reflux.kernels.slices import slices
from reflux.kernels.triton_launch import usable

# (rows, student, others, where the gradient of the student's raw logits is written or None) -> the loss
FusedLoss = Callable[[slice, RawTable, list[RawTable], Tensor | None], Tensor]


def can_fuse(h_NH: Tensor) -> bool:
    """True where the kernels run and their float32 is not less than the model's precision."""
    return usable(h_NH.device) and h_NH.element_size() <= 4


@torch.no_grad()
def run_fused(
    h_NH: Tensor,
    head: Head,
    constants: Sequence[tuple[Tensor, Head]],
    fused_loss: FusedLoss,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum of `fused_loss` over all rows, and the gradients of hidden states and of the parameters of the
    head, in the head's precision, for which `needs` is True.
    """
    gradient = any(needs)
    chunk, block = fused_rows(len(h_NH), head.vocabulary, 1 + len(constants), h_NH.element_size())
    student = open_pass(head, needs[1:] if gradient else None, alone=len(h_NH) <= chunk)
    work = _Fused(student, head, [(open_pass(of, None), of) for _, of in constants], fused_loss)
    grad_NH = torch.empty_like(h_NH) if needs[0] else None
    total = torch.zeros((), dtype=torch.float32, device=h_NH.device)
    for rows in slices(len(h_NH), chunk):
        student.begin(h_NH[rows])
        for (other, _), (g_NG, _) in zip(work.others, constants, strict=True):
            other.begin(g_NG[rows])
        total += work.chunk(rows, block, gradient, None if grad_NH is None else grad_NH[rows])
    return total, [grad_NH, *student.grads]


@dataclass
class _Fused:
    """The methods return before the next chunk or block begins, so only one of its matrices is in memory."""

    student: HeadPass
    head: Head
    others: list[tuple[HeadPass, Head]]
    fused_loss: FusedLoss

    def chunk(self, rows: slice, block: int, gradient: bool, grad_nH: Tensor | None) -> Tensor:
        """The loss of a chunk. The gradient of its hidden states is written into grad_nH."""
        d_NV, losses = self.student.new_gradient() if gradient else None, []
        for part in slices(rows.stop - rows.start, block):
            with torch.autocast(self.head.device.type, enabled=False), torch.set_grad_enabled(gradient):
                losses.append(self.block(rows.start, part, None if d_NV is None else d_NV[part]))
        if d_NV is not None:
            made_nH = self.student.back(d_NV, hidden=grad_nH is not None)
            if grad_nH is not None and made_nH is not None:
                grad_nH.copy_(made_nH)
        return torch.stack(losses).sum()

    def block(self, start: int, part: slice, d_NV: Tensor | None) -> Tensor:
        student = RawTable(self.student.wide(part), self.head)
        device = student.raw_NV.device
        others = [RawTable(other.wide(part).to(device), head) for other, head in self.others]
        return self.fused_loss(slice(start + part.start, start + part.stop), student, others, d_NV)
