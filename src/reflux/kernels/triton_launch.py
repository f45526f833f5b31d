"""Launches the fused kernels over rows of raw logits, and says where they can run."""

from __future__ import annotations

import os
from functools import cache
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
    """True if the kernels can run on tensors of this device: it is a GPU on which one has run, or Triton's
    interpreter is on.
    """
    if device.type == "cuda":
        return unusable_because(device) is None
    return _INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unusable_because(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, found by running one; None if they can. Triton needs a C
    compiler and the headers of Python on the machine, and a GPU that it knows.
    """
    if not _INSTALLED:
        return "Triton is not installed"
    from reflux.kernels.triton_draw import draw_rows

    try:
        none_1 = torch.zeros(1, dtype=torch.int64, device=device)
        draw_rows(torch.zeros(1, 2, device=device), none_1, none_1, 1.0)
    except Exception as error:
        # Triton raises whatever its compilers raise.
        return f"one could not be run: {str(error).strip().partition(chr(10))[0]}"
    return None


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
