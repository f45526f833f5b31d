"""Four sums over the vocabulary with hand-written gradients, for speed, memory and probabilities of 0.

They run on every trained position, on matrices [N, V]. Plain autograd keeps more of these matrices, passes
over them more often, and turns a probability of 0 into 0 * inf = NaN. Each gradient is tested against finite
differences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class KL(Function):
    """sum_v p (log p - log q), [N]. It saves only p and log p - log q, and computes each gradient in one
    pass.
    """

    @staticmethod
    def forward(ctx: Any, p_logp_NV: Tensor, q_logp_NV: Tensor) -> Tensor:
        p_NV, gap_NV = p_logp_NV.exp(), p_logp_NV - q_logp_NV
        kl_N = torch.linalg.vecdot(p_NV, gap_NV)
        if not _may_look(kl_N) or kl_N.isnan().any():
            # p = 0 contributes 0, not 0 * inf. The mask takes longer than all the rest and is seldom
            # needed, so on a CPU it is applied only where it is.
            gap_NV.masked_fill_(p_NV == 0, 0)
            kl_N = torch.linalg.vecdot(p_NV, gap_NV)
        ctx.save_for_backward(p_NV, gap_NV if ctx.needs_input_grad[0] else None)
        return kl_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        p_NV, gap_NV = ctx.saved_tensors
        grad_N1 = grad_N[:, None]
        grad_p_NV = torch.addcmul(p_NV, p_NV, gap_NV).mul_(grad_N1) if gap_NV is not None else None
        return grad_p_NV, p_NV * -grad_N1 if ctx.needs_input_grad[1] else None


class TokenLogp(Function):
    """log p(a) of one token per row, [N], from logits and their log-softmax. Its gradient e_a - p is
    computed in one pass, without a scatter.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, logp_NV: Tensor, ids_N: Tensor) -> Tensor:
        ctx.save_for_backward(logp_NV, ids_N)
        ctx.dtype = logits_NV.dtype
        return logp_NV.gather(-1, ids_N[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logp_NV, ids_N = ctx.saved_tensors
        grad_NV = logp_NV.exp().mul_(-grad_N[:, None])
        grad_NV[torch.arange(len(ids_N), device=ids_N.device), ids_N] += grad_N
        return grad_NV.to(ctx.dtype), None, None


class Mixture(Function):
    """log((1 - share) exp(a) + share exp(b)) for 0 < share < 1. Exactly a where a = b, with a zero gradient
    where both are -inf.
    """

    @staticmethod
    def forward(ctx: Any, a_NV: Tensor, b_NV: Tensor, share: float) -> Tensor:
        m_NV = torch.maximum(a_NV, b_NV)
        gap_NV = (b_NV - a_NV).masked_fill_(m_NV == -torch.inf, 0)
        # the share of the less likely of a and b
        smaller_NV = torch.full_like(gap_NV, 1 - share).masked_fill_(gap_NV < 0, share)
        m_NV = gap_NV.abs_().neg_().expm1_().mul_(smaller_NV).log1p_().add_(m_NV)
        ctx.share = share
        ctx.save_for_backward(a_NV, b_NV, m_NV)
        return m_NV

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_NV: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        a_NV, b_NV, m_NV = ctx.saved_tensors
        m_NV = m_NV.masked_fill(m_NV == -torch.inf, 0)
        grads = [
            (x_NV - m_NV).exp_().mul_(grad_NV).mul_(share) if needed else None
            for x_NV, share, needed in (
                (a_NV, 1 - ctx.share, ctx.needs_input_grad[0]),
                (b_NV, ctx.share, ctx.needs_input_grad[1]),
            )
        ]
        return grads[0], grads[1], None


class Tail(Function):
    """logsumexp over the ids that are not listed, [N, 1]. Where all ids are listed it is -inf with a zero
    gradient (torch.logsumexp gives a NaN gradient there).
    """

    @staticmethod
    def forward(ctx: Any, logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
        rest_NV = logp_NV.scatter(-1, ids_NK, -torch.inf)
        top_N1 = rest_NV.amax(-1, keepdim=True)
        top_N1.masked_fill_(top_N1 == -torch.inf, 0)
        sum_N1 = rest_NV.sub_(top_N1).exp_().sum(-1, keepdim=True)
        ctx.save_for_backward(rest_NV, sum_N1)
        return sum_N1.log() + top_N1

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_N1: Tensor
    ) -> tuple[Tensor, None]:
        rest_NV, sum_N1 = ctx.saved_tensors
        return rest_NV * (grad_N1 / sum_N1.masked_fill(sum_N1 == 0, 1)), None


def _may_look(tensor: Tensor) -> bool:
    """True if Python can read the tensor without waiting for a GPU."""
    return tensor.device.type == "cpu"
