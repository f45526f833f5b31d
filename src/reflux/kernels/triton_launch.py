"""Launches the fused kernels over rows of raw logits, and says where they can run."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from reflux.kernels.products import aligned
from reflux.kernels.raw_table import RawTable

# Number of logits of a row that are processed at a time: 4 per thread, which is one 16-byte load of float32.
# A thread then needs at most 64 registers, so 4 rows run on one multiprocessor.
BLOCK = 1024
WARPS = 8

_INSTALLED = find_spec("triton") is not None


def usable(device: torch.device) -> bool:
    """True if the kernels can run on tensors of this device: Triton is installed, and the device is a GPU or
    Triton's interpreter is on.
    """
    return _INSTALLED and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def launch(kernel: Any, table_NV: Tensor, *arguments: Any) -> None:
    """Run one program for each row of the table, on the table's device."""
    rows, width = table_NV.shape
    block = min(BLOCK, 1 << (width - 1).bit_length())
    if rows:
        with torch.cuda.device_of(table_NV):
            # No thread without a number of its own: atomic additions of several threads for one would count.
            kernel[(rows,)](*arguments, block, num_warps=max(1, min(WARPS, block // 32)))


def of_table(table: RawTable) -> tuple[Tensor, int, int, float, float]:
    """The arguments of a kernel for one table: `of_memory`, its scale and its cap (1 without a cap)."""
    return *of_memory(table.raw_NV), table.head.scale, table.head.cap or 1.0


def of_memory(table_NV: Tensor) -> tuple[Tensor, int, int]:
    """A matrix, the distance of its rows, and the numbers of a row that a kernel may read or write: with
    the gap behind the row, if that makes them a multiple of 64.
    """
    (rows, width), stride = table_NV.shape, table_NV.stride(0)
    memory = table_NV.untyped_storage().nbytes() // table_NV.element_size() - table_NV.storage_offset()
    whole = aligned(width)
    fits = whole <= stride and (rows - 1) * stride + whole <= memory
    return table_NV, stride, whole if fits else width
