"""Root-mean-square norms on the CPU, in float32, with their own backward pass.

    y = w x r,   r = (mean(x^2) + eps)^-1/2,   dx = r (g w - n mean(g w n)),   dw = sum(g n),   n = x r

In torch, the backward pass of this formula takes a dozen elementwise passes. The layer norm of torch has a
fused backward pass, which for a mean of zero gives dx - r mean(g w). One product with the weight adds the
missing term.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# tolerance of the trial, for rounding
_CLOSE = 1e-5


def fuse_norms(net: Any) -> None:
    """Replace the forward of every float32 norm on the CPU whose class computes this formula. A trial run
    tests each class.
    """
    verdicts: dict[type, bool] = {}
    module: Any
    for module in net.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or "variance_epsilon" not in vars(module):
            continue
        if module.weight.device.type != "cpu" or module.weight.dtype != torch.float32:
            continue
        if kind not in verdicts:
            verdicts[kind] = _on_trial(module)
        if verdicts[kind]:
            module.forward = partial(_forward, module)


@torch.no_grad()
def _on_trial(module: Any) -> bool:
    """True if a copy with random weights gives the same result as `rms_norm`. The trial has its own random
    generator, because loading a model must not change the global random state.
    """
    copy, rng = deepcopy(module), torch.Generator().manual_seed(0)
    copy.weight.normal_(generator=rng)
    x = torch.randn(2, 3, *copy.weight.shape, generator=rng)
    return torch.allclose(copy(x), rms_norm(x, copy.weight, copy.variance_epsilon), rtol=_CLOSE, atol=_CLOSE)


def _forward(module: Any, hidden_states: Tensor) -> Tensor:
    # The parameters are read at each call, because they may be replaced.
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x w / sqrt(mean(x^2) + eps) over the last dimension, differentiable once."""
    return _RMS.apply(hidden_states, weight, eps)  # pyright: ignore[reportReturnType]


class _RMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        )
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        sizes, zero = [x.shape[-1]], torch.zeros_like(scale)
        wanted = [needs_x, needs_weight, False]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, sizes, zero, scale, weight, None, wanted
        )
        if needs_x:
            mean = torch.mv(grad.view(-1, sizes[0]), weight).view_as(scale).div_(sizes[0])
            grad_x.add_(mean.mul_(scale))
        return grad_x if needs_x else None, grad_weight if needs_weight else None, None
