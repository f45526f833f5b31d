"""float32 linear layers on the CPU through oneDNN.

torch multiplies float32 matrices with MKL, which takes its slow path on processors that are not Intel's; oneDNN, in the same torch build,
does not. Same mathematics, same precision, another order of summation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_FEW_ROWS = 512  # below, the call costs more than the multiplication
_AVAILABLE = torch.backends.mkldnn.is_available()


def speed_up(net: nn.Module) -> None:
    """Route every plain float32 nn.Linear of a CPU model through oneDNN. Elsewhere, or in a torch without it, nothing changes."""
    for module in net.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.forward = partial(linear, weight=module.weight, bias=module.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input @ weight.T + bias, differentiable once; F.linear for few rows, and for anything but float32 on the CPU."""
    flat_NI = input.reshape(-1, input.shape[-1])
    float32 = weight.dtype == torch.float32 and input.dtype == torch.float32
    if len(flat_NI) < _FEW_ROWS or not float32 or weight.device.type != "cpu" or not _AVAILABLE:
        return F.linear(input, weight, bias)
    flat_NO = _Product.apply(flat_NI, weight) if torch.is_grad_enabled() else _product(flat_NI, weight)
    out = flat_NO.view(*input.shape[:-1], weight.shape[0])  # pyright: ignore[reportOptionalMemberAccess]
    return out if bias is None else out + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return _product(x_NI, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NI, weight_OI = ctx.saved_tensors
        grad_NI = _product(grad_NO, weight_OI.t()) if ctx.needs_input_grad[0] else None
        grad_OI = grad_NO.t() @ x_NI if ctx.needs_input_grad[1] else None  # MKL: the copies oneDNN needs here cost what it gains
        return grad_NI, grad_OI


def _product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a @ b.T. The operator is the one that torch's own compiler emits for linear layers on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(a_MK.contiguous(), b_NK.contiguous(), None, "none", [], "")
