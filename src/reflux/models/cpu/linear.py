"""float32 linear layers on the CPU with oneDNN.

Forward and backward use `kernels.products`, whose docstring gives the reason.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reflux.kernels import products

# With fewer rows, the call takes longer than the multiplication.
_FEW_ROWS = 512


def speed_up(net: nn.Module) -> None:
    """Let every plain float32 nn.Linear on the CPU use oneDNN. All other modules are unchanged."""
    for module in net.modules():
        if (
            type(module) is nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
        ):
            module.forward = partial(_forward, module)


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    # The parameters are read at each call, because they may be replaced.
    return linear(input, module.weight, module.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input @ weight.T + bias, differentiable once. It is F.linear for few rows, and for anything but
    float32 on the CPU.
    """
    flat_NI = input.reshape(-1, input.shape[-1])
    float32 = weight.dtype == torch.float32 and input.dtype == torch.float32
    if len(flat_NI) < _FEW_ROWS or not float32 or weight.device.type != "cpu":
        return F.linear(input, weight, bias)
    flat_NO = _Product.apply(flat_NI, weight) if torch.is_grad_enabled() else products.scores(flat_NI, weight)
    out = flat_NO.view(*input.shape[:-1], weight.shape[0])  # pyright: ignore[reportOptionalMemberAccess]
    return out if bias is None else out + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return products.scores(x_NI, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NI, weight_OI = ctx.saved_tensors
        grad_NI = products.pull_back(grad_NO, weight_OI) if ctx.needs_input_grad[0] else None
        grad_OI = products.outer(grad_NO, x_NI) if ctx.needs_input_grad[1] else None
        return grad_NI, grad_OI
