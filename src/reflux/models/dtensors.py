"""Tensors that are divided among several processes (torch's `DTensor`). Each process has some of the rows."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def divided(tensor: Tensor) -> Any:
    """The tensor as a DTensor, or None if it is a plain tensor."""
    # Importing torch.distributed.tensor takes time. Without the import nothing is divided.
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; a plain tensor is returned unchanged. The processes that hold the parts of a divided
    tensor must all call this, in the same order.
    """
    found = divided(tensor)
    return tensor if found is None else found.full_tensor()


def divided_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """`whole`, divided as `parameter` is; unchanged where `parameter` is a plain tensor or `whole` is divided
    already. Every process has all of `whole`, so nothing is sent.
    """
    found = divided(parameter)
    if found is None or divided(whole) is not None:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(found.device), found.device_mesh, found.placements, src_data_rank=None)
