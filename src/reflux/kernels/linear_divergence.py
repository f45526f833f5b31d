"""Rows of hidden states through the student's head in chunks, the gradient made in the same pass.

All row coefficients are known before the forward, so each chunk runs head, costs and backward at once and keeps nothing: the peak is
that of one chunk, and nothing is computed twice. The teacher's head is applied to the same rows inside `chunk_loss`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reflux.kernels.head import Head

_BUDGET_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_FLOATS_PER_LOGIT = 8  # student and teacher logits, their log-softmax, the divergence's terms and gradients, in float32


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many rows fit the memory budget: at least 16, so that the matrix products stay worth their launch."""
    return max(16, _BUDGET_BYTES.get(device.type, 1 << 30) // (4 * _FLOATS_PER_LOGIT * vocabulary))


def backward_rows(h_NH: Tensor, head: Head, chunk_loss: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """Sum of `chunk_loss(rows, logits_NV)` over the chunks, detached. Gradients go to the head and, through h_NH, to the trunk."""
    grad_NH = torch.empty_like(h_NH)
    total = torch.zeros((), device=h_NH.device)
    size = chunk_rows(head.vocabulary, h_NH.device)
    for start in range(0, len(h_NH), size):
        rows = slice(start, start + size)
        leaf = h_NH[rows].detach().requires_grad_()
        loss = chunk_loss(rows, head.logits(leaf))
        if loss.requires_grad:
            loss.backward()
        grad_NH[rows] = leaf.grad if leaf.grad is not None else 0
        total = total + loss.detach()
    h_NH.backward(grad_NH)
    return total
