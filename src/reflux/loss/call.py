"""Checks the arguments of `linear_divergence`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reflux.kernels.head import Head
from reflux.loss.term import LossTerm


def check_call(
    student_NH: Tensor,
    student_head: Head,
    teacher_NG: Tensor,
    teacher_head: Head,
    by_row: Mapping[str, Tensor | None],
    objective: LossTerm | None,
    top_k: int,
) -> None:
    """Raise ValueError for arguments that do not fit. by_row: one number per row, None if not given."""
    for name, head in (("student_head", student_head), ("teacher_head", teacher_head)):
        if not isinstance(head, Head):
            kind = type(head).__name__
            raise ValueError(
                f"{name} must be Head.of_net(model, len(tokenizer)) or Head.of(weight), got {kind}"
            )
    for name, table in (("student_NH", student_NH), ("teacher_NG", teacher_NG)):
        if not isinstance(table, Tensor) or table.ndim != 2:
            raise ValueError(
                f"{name} must be hidden states [N, H], one row per position; got {_shape(table)}. "
                "Flatten them: h[mask]"
            )
    for name, column in by_row.items():
        if column is not None and (not isinstance(column, Tensor) or column.ndim != 1):
            raise ValueError(f"{name} must be a tensor [N], one number per row; got {_shape(column)}")
        if column is not None and column.requires_grad:
            raise ValueError(
                f"{name} is a constant of this loss and gets no gradient, but its requires_grad is True. "
                f"Pass {name}.detach()"
            )
    lengths = {"student_NH": len(student_NH), "teacher_NG": len(teacher_NG)}
    lengths |= {name: len(column) for name, column in by_row.items() if column is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"all arguments must have one row per position, but the numbers of rows differ: {lengths}"
        )
    if objective is not None and not callable(objective):
        raise ValueError(
            "objective must be an objective such as Divergence(divergence='forward') or SampledKL(), got "
            f"{objective!r}"
        )
    if top_k < 0:
        raise ValueError(f"top_k must be 0 or more, got {top_k}")
    _check_vocabulary(student_head, teacher_head, by_row["ids_N"])
    _check_width("student", student_head, student_NH)
    _check_width("teacher", teacher_head, teacher_NG)


def _check_vocabulary(student_head: Head, teacher_head: Head, ids_N: Tensor | None) -> None:
    size = student_head.vocabulary
    if teacher_head.vocabulary != size:
        raise ValueError(
            f"the student's head has {size} tokens and the teacher's has {teacher_head.vocabulary}. If both "
            "use the same token ids and only the padding differs, cut both to the tokenizer's size: "
            "Head.of_net(model, len(tokenizer)), or Head.of(weight[:len(tokenizer)])."
        )
    if ids_N is None or not len(ids_N):
        return
    # One copy from the device for both numbers.
    low, high = torch.stack(ids_N.aminmax()).cpu().tolist()
    if ids_N.dtype != torch.int64 or low < 0 or high >= size:
        raise ValueError(
            f"ids_N must be int64, in 0..{size - 1}; got {ids_N.dtype} from {low} to {high}. Remove rows "
            "without a token (labels of -100 mark them), from the hidden states as well: h[labels >= 0]."
        )


def _check_width(who: str, head: Head, h_NH: Tensor) -> None:
    if head.matrix is not None and head.matrix[0].shape[1] != h_NH.shape[1]:
        raise ValueError(
            f"the {who}'s hidden states have size {h_NH.shape[1]}, but its head takes size "
            f"{head.matrix[0].shape[1]}"
        )


def _shape(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
