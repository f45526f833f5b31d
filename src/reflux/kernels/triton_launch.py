"""Launches the fused kernels over rows of tables (matrices of logits), and checks their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Number of logits of a row that are processed at a time: 8 per thread, which is one 16-byte load of
# bfloat16. A thread then needs at most 64 registers, so 4 rows run on one multiprocessor.
BLOCK = 2048


WARPS = 8


def known_lse(logits_NV: Tensor, lse_N: Tensor | None) -> Tensor:
    if lse_N is None:
        return launch_logsumexp(rows_of(logits_NV.detach()))
    if lse_N.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"the logsumexp of logits {list(logits_NV.shape)} must have one number per row, got "
            f"{list(lse_N.shape)}"
        )
    return lse_N.detach().float().contiguous()


def launch_logsumexp(logits_NV: Tensor, skip_NV: Tensor | None = None) -> Tensor:
    from reflux.kernels.triton_kernels import row_logsumexp

    lse_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    # The kernel does not read this pointer without a skip table, so any pointer is valid.
    skip = lse_N if skip_NV is None else skip_NV
    launch(
        row_logsumexp,
        logits_NV,
        logits_NV,
        logits_NV.stride(0),
        skip,
        lse_N,
        logits_NV.shape[1],
        skip_NV is not None,
    )
    return lse_N


def launch_sums(
    student_NV: Tensor,
    teacher_NV: Tensor,
    student_lse_N: Tensor,
    teacher_lse_N: Tensor,
    kind: str,
    share: float,
) -> tuple[Tensor, Tensor]:
    from reflux.kernels.triton_kernels import row_sums

    student_NV, teacher_NV = rows_of(student_NV), rows_of(teacher_NV)
    cost_N, slope_N = torch.empty_like(student_lse_N), torch.empty_like(student_lse_N)
    tables = (*table(student_NV, student_lse_N), *table(teacher_NV, teacher_lse_N))
    launch(row_sums, student_NV, *tables, cost_N, slope_N, student_NV.shape[1], share, kind)
    return cost_N, slope_N


def table(logits_NV: Tensor, lse_N: Tensor) -> tuple[Tensor, int, Tensor]:
    """The arguments of a kernel for one matrix of logits: the matrix, its row stride and its logsumexp."""
    return logits_NV, logits_NV.stride(0), lse_N


def launch(kernel: Any, table_NV: Tensor, *arguments: Any) -> None:
    """Run one program for each row of the table, on the table's device."""
    rows, width = table_NV.shape
    block = min(BLOCK, 1 << (width - 1).bit_length())
    if rows:
        with torch.cuda.device_of(table_NV):
            kernel[(rows,)](*arguments, block, num_warps=WARPS)


def rows_of(logits_NV: Tensor) -> Tensor:
    """The table with the logits of each row contiguous in memory. There may be gaps between rows."""
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()


def check(*tables: Tensor) -> None:
    first = tables[0]
    if any(table.ndim != 2 or table.shape != first.shape or table.shape[1] == 0 for table in tables):
        shapes = " and ".join(str(list(table.shape)) for table in tables)
        raise ValueError(f"matrices of logits must have equal shapes [N, V] with V > 0, got {shapes}")
