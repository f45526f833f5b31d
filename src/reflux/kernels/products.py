"""The matrix products of a linear layer, each by its fastest implementation.

torch multiplies float32 matrices on a CPU with MKL, which is slow on processors that are not from Intel.
oneDNN, in the same torch build, is fast on them and reads transposed matrices without a copy. The
mathematics and the precision are the same; the order of summation is different.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# With fewer operations, the call takes longer than the multiplication.
_WORTH_FLOPS = 1 << 25
# vocabulary rows per call: oneDNN repacks a matrix before it multiplies, and would copy a whole output head
_BLOCK = 4096
# number of summed rows below which adding the block to the sum takes longer than oneDNN saves over MKL
_DEEP = 96
_AVAILABLE = torch.backends.mkldnn.is_available()


def scores(h_NH: Tensor, weight_VH: Tensor) -> Tensor:
    """h @ weight.T, [N, V]."""
    if not _worth(h_NH, weight_VH):
        return h_NH @ weight_VH.t()
    if len(weight_VH) <= _BLOCK:
        return _by_onednn(h_NH, weight_VH)
    out_NV = h_NH.new_empty(len(h_NH), len(weight_VH))
    for some in _blocks(weight_VH):
        out_NV[:, some] = _by_onednn(h_NH, weight_VH[some])
    return out_NV


def wide_scores(h_NH: Tensor, weight_VH: Tensor) -> Tensor:
    """h @ weight.T in float32, [N, V], from factors of any precision. The rows have `aligned` lengths in
    memory.
    """
    rows, vocabulary = len(h_NH), len(weight_VH)
    wide_NV = h_NH.new_empty(rows, aligned(vocabulary), dtype=torch.float32)[:, :vocabulary]
    if h_NH.dtype == torch.float32:
        return torch.mm(h_NH, weight_VH.t(), out=wide_NV)
    # A GPU multiplies 16 bits so, and refuses to make float32 of float64.
    if h_NH.is_cuda and h_NH.element_size() == 2:
        return torch.mm(h_NH, weight_VH.t(), out_dtype=torch.float32, out=wide_NV)
    return torch.mm(h_NH.float(), weight_VH.t().float(), out=wide_NV)


def aligned(vocabulary: int) -> int:
    """The distance of the rows of a matrix [N, V] in memory: the matrix products of a GPU are slow if rows
    begin at addresses that are no multiples of 16 bytes.
    """
    return -(-vocabulary // 64) * 64


def pull_back(d_NV: Tensor, weight_VH: Tensor) -> Tensor:
    """d @ weight, [N, H]: the gradient of the hidden states."""
    if not _worth(d_NV, weight_VH.t()):
        return d_NV @ weight_VH
    if len(weight_VH) <= _BLOCK:
        return _by_onednn(d_NV, weight_VH.t())
    out_NH = d_NV.new_zeros(len(d_NV), weight_VH.shape[1])
    for some in _blocks(weight_VH):
        out_NH += _by_onednn(d_NV[:, some], weight_VH[some].t())
    return out_NH


def outer(d_NV: Tensor, h_NH: Tensor) -> Tensor:
    """d.T @ h, [V, H]: the gradient of a weight."""
    return _by_onednn(d_NV.t(), h_NH.t()) if _worth(d_NV.t(), h_NH.t()) else d_NV.t() @ h_NH


def add_outer(sum_VH: Tensor, d_NV: Tensor, h_NH: Tensor, fresh: bool = False) -> None:
    """sum += d.T @ h, in place: the gradient of the head. `sum_VH` may have a wider dtype than d and h.

    fresh: True if the sum is still 0. A GPU then does not read it.
    """
    beta = 0 if fresh and sum_VH.is_cuda else 1
    same = sum_VH.dtype == d_NV.dtype
    fast = same and len(sum_VH) > _BLOCK and len(d_NV) >= _DEEP and _worth(d_NV.t(), h_NH.t())
    if same and not fast:
        sum_VH.addmm_(d_NV.t(), h_NH, beta=beta)
        return
    if sum_VH.is_cuda and _adds_wide(sum_VH.device, d_NV.dtype):
        _add_wide(sum_VH, d_NV.t(), h_NH, beta)
        return
    for some in _blocks(sum_VH):
        d_BN = d_NV[:, some].t()
        sum_VH[some] += _by_onednn(d_BN, h_NH.t()) if fast else d_BN @ h_NH


def _add_wide(sum_VH: Tensor, d_VN: Tensor, h_NH: Tensor, beta: int) -> None:
    """sum = beta sum + d @ h, by one product of narrow factors that adds in float32."""
    torch.ops.aten.addmm.dtype_out(sum_VH, d_VN, h_NH, torch.float32, beta=beta, out=sum_VH)


@cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """True if this version of torch can add a product of narrow factors to a float32 matrix. Older versions
    refuse it.
    """
    narrow = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        _add_wide(narrow.float(), narrow, narrow, 1)
    except (RuntimeError, AttributeError):
        return False
    return True


def _blocks(table_VX: Tensor) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, len(table_VX), _BLOCK))


def _worth(a_MK: Tensor, b_NK: Tensor) -> bool:
    float32 = a_MK.dtype == b_NK.dtype == torch.float32
    flops = 2 * a_MK.shape[0] * a_MK.shape[1] * b_NK.shape[0]
    return _AVAILABLE and float32 and a_MK.device.type == "cpu" and flops >= _WORTH_FLOPS


def _by_onednn(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a @ b.T, with the operator that torch's own compiler uses for linear layers on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
